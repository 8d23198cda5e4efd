"""What an assistant wrote, as characters and as tokens of a rendered conversation.

A conversation is rendered whole and tokenised once; what is trained is a set of character spans, one per assistant
turn: all that the template writes after the assistant's header, its end-of-turn token included.  Spans come from the
template's own `{% generation %}` marks where it has them.  Otherwise the conversation is rendered again with a sentinel
character for what the assistant said: the text before and after the sentinel is the template's, the rest is the turn's.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                           └────trained────┘
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pegbox.data.rejects import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int, bool]  # start, stop, closed

TRIMS = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a content
PRIVATE_USE = range(0xE000, 0xF900)  # code points that no text should hold


@dataclass(frozen=True, slots=True)
class Turn:
    """Characters `[start, stop)` of a rendered conversation that the assistant wrote as `messages[message]`.

    `closed`: they end with what ends a turn.  `train`: False where the message says `"train": false`.
    """

    message: int
    start: int
    stop: int
    closed: bool
    train: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template writes it, and the assistant's turns in it, in order."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class TemplateProof:
    """What was learnt, and shown, about one template with one tokenizer.

    Attributes:
        source: the Jinja text; `options`: variables given to it (`enable_thinking`, say).
        by: "marks" (the template's `{% generation %}`) or "sentinels".
        prompted: `add_generation_prompt` changes what it writes.
        leads: what it writes between that prompt and an assistant's content, longest first.
        closing: what ends an assistant's turn amid a conversation; `last_closing`: at its end.
        drops: roles (and "tool_calls") whose content it leaves out; such rows are rejected.
        unproven: "system" or "tool" where the probe with such a message failed; such rows are rejected.
        refused: probes that it refuses to render; `probes`: those it passed.
        note: what the user should be told, or nothing.
    """

    source: str
    options: Mapping[str, Any]
    by: str
    prompted: bool
    leads: tuple[str, ...]
    closing: str
    last_closing: str
    drops: frozenset[str] = frozenset()
    unproven: frozenset[str] = frozenset()
    refused: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Draw:
    """The template as a function of messages."""

    tokenizer: Tokenizer
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                tools=self.tools or None,  # type: ignore[arg-type]
                chat_template=self.source,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.options,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError("template refuses", str(error)) from error
        return str(text)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids as transformers gives them, the reference for ours."""
        out: Any = self.tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]
            chat_template=self.source,
            return_dict=True,
            **self.options,
        )
        return list(out["input_ids"])

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans inside `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [messages],  # type: ignore[list-item]
            tools=self.tools or None,  # type: ignore[arg-type]
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        return rendered[0][0], rendered[1][0]

    @property
    def control(self) -> re.Pattern[str]:
        """Matches a token that was added to the vocabulary whole, as control tokens are."""
        added = sorted((t.content for t in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, added)) or "(?!)")


# -- where the assistant's turns are -------------------------------------------------------------------------------


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    proof: TemplateProof,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """A conversation's text, exactly as `apply_chat_template` writes it, and the assistant's turns.

    Raises:
        RowError: the template refuses these messages, leaves one out, or writes a turn that cannot be delimited.
    """
    draw = Draw(tokenizer, proof.source, proof.options, tools)
    chat = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    asked = [m["role"] for m in messages if m.get("train") and m["role"] != "assistant"]
    if asked:
        raise RowError("train: true on another's turn", f"on a {asked[0]!r} message; only the assistant is trained")
    text = draw(chat)
    _check_kept(chat, text, proof)
    indices = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    find = _marked_spans if proof.by == "marks" else _sentinel_spans
    return Rendered(
        text,
        tuple(
            Turn(i, start, stop, closed, messages[i].get("train") is not False)
            for i, (start, stop, closed) in zip(indices, find(draw, chat, indices, text, proof), strict=True)
        ),
    )


def _check_kept(chat: Sequence[dict[str, Any]], text: str, proof: TemplateProof) -> None:
    for message in chat:
        role, content = message["role"], message.get("content")
        if role in proof.unproven or ("tool" in proof.unproven and message.get("tool_calls")):
            raise RowError(f"template is not proven with {role!r} messages", proof.note)
        if "tool_calls" in proof.drops and message.get("tool_calls"):
            raise RowError("template drops tool_calls", "use a template that writes them")
        if not isinstance(content, str) or not content.strip() or role in ("user", "assistant"):
            continue
        if role in proof.drops or (role not in ("system", "tool") and content.strip() not in text):
            raise RowError(f"template drops {role!r} messages", "fold them into a user's, or use another template")


def _marked_spans(
    draw: Draw, chat: Sequence[dict[str, Any]], indices: Sequence[int], text: str, proof: TemplateProof
) -> list[Span]:
    written, spans = draw.marked(chat)
    if written != text or len(spans) != len(indices):
        raise RowError("turn not found", f"{len(spans)} {{% generation %}} spans for {len(indices)} assistant messages")
    return [_without_blank_after(text, start, stop, proof) for start, stop in spans]


def _without_blank_after(text: str, start: int, stop: int, proof: TemplateProof) -> Span:
    """A marked span up to the end-of-turn in it: marks often take in the newline that follows."""
    ends = tuple(filter(None, (proof.closing, proof.last_closing)))
    words = start + len(text[start:stop].rstrip())
    found = next((at for at in (stop, words) if text.endswith(ends, start, at)), None)
    return (start, stop, False) if found is None else (start, found, True)


def _sentinel_spans(
    draw: Draw, chat: Sequence[dict[str, Any]], indices: Sequence[int], text: str, proof: TemplateProof
) -> list[Span]:
    sentinel = next(c for c in map(chr, PRIVATE_USE) if c not in text)
    return _all_at_once(draw, chat, indices, text, proof, sentinel) or [
        _replaced(draw, chat, i, text, proof, sentinel) or _between_prefixes(draw, chat, i, text) for i in indices
    ]


def _all_at_once(
    draw: Draw, chat: Sequence[dict[str, Any]], indices: Sequence[int], text: str, proof: TemplateProof, sentinel: str
) -> list[Span] | None:
    """Spans of plain turns: the text must be the sentinel's text with each content, or its trimmed form, put in."""
    if not all(chat[i].keys() == {"role", "content"} and isinstance(chat[i]["content"], str) for i in indices):
        return None
    try:
        pieces = draw([m | {"content": sentinel} if m["role"] == "assistant" else m for m in chat]).split(sentinel)
    except RowError:
        return None
    if len(pieces) != len(indices) + 1:
        return None
    for trim in TRIMS:
        contents = [trim(chat[i]["content"]) for i in indices]
        if text == pieces[0] + "".join(c + p for c, p in zip(contents, pieces[1:], strict=True)):
            return list(_plain_spans(text, pieces, contents, proof))
    return None


def _plain_spans(text: str, pieces: Sequence[str], contents: Sequence[str], proof: TemplateProof) -> Iterator[Span]:
    at = 0
    for piece, content in zip(pieces, contents, strict=False):
        at += len(piece)
        stop, closed = _close(text, at + len(content), proof)
        yield at - _lead(piece, proof), stop, closed
        at += len(content)


def _replaced(
    draw: Draw, chat: Sequence[dict[str, Any]], i: int, text: str, proof: TemplateProof, sentinel: str
) -> Span | None:
    """One turn's span, whatever it holds (tool calls, reasoning): all that differs from a turn that says one thing."""
    content = [{"type": "text", "text": sentinel}] if isinstance(chat[i].get("content"), list) else sentinel
    try:
        blank = draw([*chat[:i], {"role": "assistant", "content": content}, *chat[i + 1 :]])
    except RowError:  # a tool's answer without the call, say
        return None
    before, found, after = blank.partition(sentinel)
    head = before[: len(before) - _lead(before, proof)]
    if not found or len(head) + len(after) > len(text) or not (text.startswith(head) and text.endswith(after)):
        return None
    return len(head), *_close(text, len(text) - len(after), proof)


def _between_prefixes(draw: Draw, chat: Sequence[dict[str, Any]], i: int, text: str) -> Span:
    """One turn's span: from the prompt for it to the last control token before the text goes on."""
    before = draw(chat[:i], prompt=True) if i else ""
    after = draw(chat[: i + 1])
    shared = len(shared_prefix(after, text))
    ends = [m.end() for m in draw.control.finditer(text, len(before), shared)]
    if not text.startswith(before) or not ends:
        raise RowError("turn not found", f"the template writes message {i} in a way that other messages change")
    return len(before), ends[-1], True


def _lead(before: str, proof: TemplateProof) -> int:
    """How many of the last characters before a content the model has to write itself."""
    return next(len(lead) for lead in (*proof.leads, "") if before.endswith(lead))


def _close(text: str, at: int, proof: TemplateProof) -> tuple[int, bool]:
    """Where the turn whose content ends at `at` ends, and whether with an end-of-turn."""
    for closing in (proof.last_closing, proof.closing):
        if closing and text.startswith(closing, at):
            return at + len(closing), True
    return at, False


# -- from characters to tokens -------------------------------------------------------------------------------------


def trained_tokens(offsets: Sequence[tuple[int, int]], text: str, turns: Sequence[Turn]) -> list[range]:
    """The tokens of each turn: all that hold one of its characters.

    A token that joins whitespace of the header to the first word (" Hello" after "Assistant: ") is the turn's; one
    that joins any other character of the header is not.

    Args:
        offsets: (T, 2) first and past-the-last character of every token of `text`, from one tokenisation of it.
    """
    starts, ends = [o[0] for o in offsets], [o[1] for o in offsets]
    found = []
    for turn in turns:
        # By its end: tokenizers that trim offsets give a blank token no width, at the end of the blank.
        first = bisect.bisect_right(ends, turn.start)
        past = bisect.bisect_left(starts, turn.stop)
        if first < past and text[starts[first] : turn.start].strip():
            first += 1
        found.append(range(first, max(first, past)))
    return found


def shared_prefix(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])  # noqa: RUF071 - of texts, not of paths
