"""Conversations in any published spelling, to messages `{"role", "content", "train"?, "tool_calls"?, ...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pegbox.core.errors import did_you_mean
from pegbox.data.rejects import RowError

Message = dict[str, Any]

CALL = "call"  # a turn that holds nothing but tool calls
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
TRAIN_KEYS = ("train", "loss", "weight")  # axolotl; ms-swift; OpenAI
SURROGATE = re.compile("[\ud800-\udfff]")
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # hh-rlhf


def text(value: Any, name: str) -> str:
    """A column that must hold text; numbers are written out."""
    if value is None:
        raise RowError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"{name} is not text", f"found {type(value).__name__}")
    if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
        raise RowError(f"{name} is not valid Unicode", "it holds half of a surrogate pair")
    return str(value)


def parsed(value: Any, name: str) -> Any:
    """A value that CSV and Arrow files carry as a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as problem:
        raise RowError(f"{name} is not JSON", str(problem)) from problem


def messages(value: Any, name: str = "messages") -> list[Message]:
    """A list of turns (or its JSON string); tool calls join the assistant turn before them."""
    turns = parsed(value, name)
    if isinstance(turns, Mapping):
        turns = turns.get("messages", [turns])
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowError(f"{name} is not a list of turns", f"found {type(value).__name__}")
    found: list[Message] = []
    for turn in turns:
        one = message(turn)
        if found and _joins(found[-1], one):
            found[-1] = found[-1] | {"tool_calls": [*found[-1].get("tool_calls", []), *one["tool_calls"]]}
        else:
            found.append(one)
    return found


def message(turn: Any) -> Message:
    """One turn.

    Raises:
        RowError: no role or an unknown one, content that is not text, a flag other than 0 or 1, a call without a name.
    """
    if not isinstance(turn, Mapping):
        raise RowError("a turn is not an object", f"found {type(turn).__name__}")
    fields = {key: value for key, value in turn.items() if value is not None}
    role = _role(_take(fields, ROLE_KEYS))
    content = _take(fields, CONTENT_KEYS)
    train = _flag(_take(fields, TRAIN_KEYS))
    calls = _calls(content) if role == CALL else _calls(_take(fields, ("tool_calls", "function_call")) or [])
    return {
        "role": "assistant" if role == CALL else role,
        "content": "" if role == CALL or (content is None and calls) else _content(content),
        **({} if train is None else {"train": train}),
        **({"tool_calls": calls} if calls else {}),
        **fields,
    }


def tools(value: Any) -> list[dict[str, Any]]:
    """Tool declarations, each in the form `{"type": "function", "function": {...}}`; `value` may be JSON text."""
    declared = parsed(value, "tools") if value else []
    if isinstance(declared, Mapping):
        declared = [declared]
    if not isinstance(declared, Sequence) or isinstance(declared, str):
        raise RowError("tools is not a list", f"found {type(declared).__name__}")
    return [_tool(parsed(tool, "tools")) for tool in declared]


def transcript(value: str) -> list[Message] | None:
    """Turns of a `\\n\\nHuman: ... \\n\\nAssistant: ...` transcript; None where it is not one."""
    before, *parts = TURN.split(value)
    if not parts or before:
        return None
    roles = [{"Human": "user", "Assistant": "assistant"}[who] for who in parts[::2]]
    return [{"role": role, "content": said} for role, said in zip(roles, parts[1::2], strict=True)]


def look_like(value: Any, role_key: str, content_key: str) -> bool:
    """Whether a column holds turns in one spelling, judged by its first turn."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if not isinstance(value, Sequence) or isinstance(value, str) or not value or not isinstance(value[0], Mapping):
        return False
    return role_key in value[0] and bool({content_key, "tool_calls"} & set(value[0]))


def _take(fields: dict[str, Any], keys: Sequence[str]) -> Any:
    """Remove all of `keys`; the value of the first that is there."""
    found = [fields.pop(key) for key in keys if key in fields]
    return found[0] if found else None


def _role(value: Any) -> str:
    name = str(value).strip().lower()
    if value is None:
        raise RowError("a turn has no role")
    if name not in ROLES:
        raise RowError("unknown role", f"{value!r}{did_you_mean(name, ROLES)}")
    return ROLES[name]


def _content(value: Any) -> str:
    if not isinstance(value, list):
        return text(value, "content")
    return "".join(_part(part) for part in value)


def _part(part: Any) -> str:
    """A content part of the OpenAI layout; text only."""
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
        return text(part["text"], "content")
    found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError("a content part is not text", f"found {found!r}")


def _flag(value: Any) -> bool | None:
    if value is None:
        return None
    if value not in (0, 1):  # True and False are 1 and 0
        raise RowError("a training flag is not 0 or 1", f"found {value!r}")
    return bool(value)


def _calls(value: Any) -> list[dict[str, Any]]:
    calls = parsed(value, "function call")
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments": dict}}`: templates write the arguments as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError("a function call has no name", f"found {call!r:.80}")
    name, arguments = text(function["name"], "function name"), function.get("arguments", function.get("parameters", {}))
    kept = {"id": call["id"]} if call.get("id") and call is not function else {}
    return {**kept, "type": "function", "function": {"name": name, "arguments": _arguments(arguments)}}


def _arguments(value: Any) -> Any:
    """Arguments as an object; text that is not JSON stays text, as a model may have written it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except ValueError:
        return value


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RowError("a tool is not an object", f"found {type(tool).__name__}")
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def _joins(last: Message, one: Message) -> bool:
    """A turn of calls only, after an assistant turn: parallel calls, or what the assistant says while calling."""
    same = last["role"] == one["role"] == "assistant" and last.get("train") == one.get("train")
    return same and not one["content"] and "tool_calls" in one
