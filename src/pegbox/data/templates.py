"""Chat templates: which one, and the proof that exactly what the assistant wrote in it is trained.

`prove` runs probe conversations, whose words are known, once for each tokenizer and template, through the very
functions that later mask the rows; what it learnt on the way is what `turns.render` goes by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import DataError, did_you_mean
from pegbox.data.builtin_templates import BUILT_IN
from pegbox.data.rejects import RowError
from pegbox.data.turns import (
    PRIVATE_USE,
    TRIMS,
    Draw,
    Message,
    Rendered,
    TemplateProof,
    Turn,
    render,
    shared_prefix,
    trained_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "BUILT_IN",
    "Rendered",
    "TemplateProof",
    "Turn",
    "prove",
    "render",
    "require_offsets",
    "template_of",
    "trained_tokens",
]

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


# -- which template ------------------------------------------------------------------------------------------------


def template_of(tokenizer: Tokenizer, template: str | None = None) -> str:
    """The Jinja text: the tokenizer's own, a built-in by name, or `template` itself.

    Raises:
        DataError: the tokenizer has none and none is given, or no built-in has that name.
    """
    own = tokenizer.chat_template
    if template is None:
        if own is None:
            raise DataError(
                f"{_name(tokenizer)} has no chat template; pass template= with the Jinja text that the model was "
                f"trained on, or one of: {', '.join(sorted(BUILT_IN))}"
            )
        return tokenizer.get_chat_template()
    if isinstance(own, dict) and template in own:
        return str(own[template])
    if template in BUILT_IN:
        return BUILT_IN[template]
    if "{{" in template or "{%" in template:
        return template
    raise DataError(f"unknown chat template {template!r}{did_you_mean(template, BUILT_IN)}")


def require_offsets(tokenizer: Tokenizer) -> None:
    """Raise `DataError` unless tokens can be traced back to characters."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{_name(tokenizer)} is a {type(tokenizer).__name__}, which does not say what characters a token came "
            "from; load a tokenizer.json (a PreTrainedTokenizerFast, use_fast=True)"
        )


def _name(tokenizer: Tokenizer) -> str:
    return f"tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"


# -- proof ---------------------------------------------------------------------------------------------------------


def prove(tokenizer: Tokenizer, template: str | None = None, options: Mapping[str, Any] | None = None) -> TemplateProof:
    """Show on probe conversations that exactly the assistant's words and end-of-turn are trained, token by token.

    Args:
        template: None for the tokenizer's own, a name of `BUILT_IN`, or Jinja text.
        options: variables for the template (`{"enable_thinking": False}`).

    Raises:
        DataError: which probe failed, what was trained and should have been, and what to do; or there is no template,
            or the tokenizer is a slow one.
    """
    require_offsets(tokenizer)
    source = template_of(tokenizer, template)
    draw = Draw(tokenizer, source, dict(options or {}))
    try:
        learnt = _learn(draw)
        _check_closing(draw, learnt, template)
        if MARKS.search(source):
            return _prove_marks(draw, learnt)
        return _run_probes(draw, learnt)
    except RowError as fault:
        raise DataError(
            f"the chat template of {_name(tokenizer)} cannot be trained on: {fault}; put {{% generation %}} marks "
            "around what the assistant writes, its end-of-turn token included, or pass another template= (one of: "
            f"{', '.join(sorted(BUILT_IN))})"
        ) from fault


def _prove_marks(draw: Draw, learnt: TemplateProof) -> TemplateProof:
    try:
        return _run_probes(draw, replace(learnt, by="marks", leads=tuple(dict.fromkeys((*learnt.leads, "")))))
    except RowError as fault:
        note = f"the template's {{% generation %}} marks are not used: {fault}"
        return _run_probes(draw, replace(learnt, note=note))


def _learn(draw: Draw) -> TemplateProof:
    """Read off, from conversations of sentinels, what the template writes around an assistant's content."""
    asked, said, again, more = (chr(c) for c in PRIVATE_USE[-4:])
    chat = [_user(asked), _assistant(said), _user(again), _assistant(more)]
    try:
        text = draw(chat)
    except RowError:  # one turn only
        again, more = asked, said
        chat = chat[:2]
        text = draw(chat)
    prompt, bare = (_after(draw(chat[:-1], prompt=p), again) for p in (True, False))
    befores = [_after(text, again).partition(more)[0], _after(text, asked).partition(said)[0]]
    # Nothing where it writes another header than it prompts with.
    leads = {b.removeprefix(prompt) if b.startswith(prompt) else "" for b in befores}
    if prompt == bare:  # it has no prompt for an answer: what it writes before one is a header, unless blank
        leads = {lead if not lead.strip() else "" for lead in leads}
    closing, last = _closings(draw, _after(text, said).partition(again)[0], _after(text, more), befores[-1])
    return TemplateProof(
        draw.source, draw.options, "sentinels", prompt != bare, tuple(sorted(leads, key=len)[::-1]), closing, last
    )


def _after(text: str, sentinel: str) -> str:
    _, found, after = text.partition(sentinel)
    if not found or sentinel in after:
        raise RowError("probe 'one turn' failed", "a message's content is not written once, as it is")
    return after


def _closings(draw: Draw, mid: str, last: str, asked: str) -> tuple[str, str]:
    """What ends a turn amid a conversation, and at its end.

    Args:
        mid: what the template writes between an assistant's content and the next user's.
        last: what it writes after the last content.
        asked: what it writes between a user's content and an assistant's.
    """
    shared = shared_prefix(mid, last)
    closing = _to_control(draw, shared) or _to_control(draw, shared_prefix(mid, asked))  # any turn's, if not alike
    if not closing:
        whole = shared if shared in (mid, last) else re.sub(r"\S+$", "", shared)
        closing = whole.rstrip() or whole
    if closing and last.startswith(closing):
        return closing, _with_eos(draw, last, closing)
    return closing, _to_control(draw, last) or last.rstrip() or last


def _to_control(draw: Draw, text: str) -> str:
    """Up to its first control token, and the EOS that may follow; nothing where it has none."""
    first = draw.control.search(text)
    return _with_eos(draw, text, text[: first.end()]) if first else ""


def _with_eos(draw: Draw, text: str, closing: str) -> str:
    eos = draw.tokenizer.eos_token
    more = re.compile(rf"\s*{re.escape(eos)}").match(text, len(closing)) if eos else None
    return text[: more.end()] if more else closing


def _check_closing(draw: Draw, learnt: TemplateProof, template: str | None) -> None:
    if not learnt.last_closing:
        raise RowError("no end of turn", "it writes nothing after an assistant's words, so no model learns to stop")
    if template in BUILT_IN and not draw.control.search(learnt.last_closing):
        raise RowError("no end of turn", f"{learnt.last_closing!r} is not a token of this tokenizer")


def _run_probes(draw: Draw, proof: TemplateProof) -> TemplateProof:
    passed: list[str] = []
    refused: list[str] = []
    proof = replace(proof, drops=_dropped(draw))
    for name, chat in _probes(draw, proof).items():
        if "several turns" in refused and len(chat) == 4:
            chat = chat[2:]
        try:
            _check_probe(draw, proof, chat)
            passed.append(name)
        except RowError as fault:
            if fault.reason.startswith("template ") and name != "one turn":
                refused += [name] * (fault.reason == "template refuses")  # what it drops is in `drops`
            elif name in ("system", "tool"):
                note = f"rows with {name} messages are rejected: probe {name!r} failed: {fault}"
                note = "; ".join(filter(None, (proof.note, note)))
                proof = replace(proof, unproven=proof.unproven | {name}, note=note)
            else:
                raise RowError(f"probe {name!r} failed", str(fault)) from fault
    return replace(proof, probes=tuple(passed), refused=tuple(refused))


def _probes(draw: Draw, proof: TemplateProof) -> dict[str, list[dict[str, Any]]]:
    header, end = _sayable(draw, _header(draw)), _sayable(draw, proof.last_closing)
    return {
        "one turn": [_user("What is it?"), _assistant("A pegbox.")],
        "several turns": [_user("One?"), _assistant("Two."), _user("Three?"), _assistant("Four: five.")],
        "space around": [_user(" Hm?\n"), _assistant("  Well \n"), _user("\nSo?"), _assistant("\n\nYes.  ")],
        "says the header": [_user(header), _assistant(header), _user(header), _assistant(f"{header}a{header}")],
        "says the end": [_user(end), _assistant(f"a{end}b"), _user("c"), _assistant(f"{end} d")],
        "says the same": [_user("Same"), _assistant("Same"), _user("Same"), _assistant("Same")],
        "system": [_message("system", "Be brief."), _user("Who?"), _assistant("Me.")],
        "tool": _tool_chat("It is 3."),
    }


def _header(draw: Draw) -> str:
    """What comes between a user's words and an assistant's."""
    asked, said = (chr(c) for c in PRIVATE_USE[-2:])
    header = _after(draw([_user(asked), _assistant(said)]), asked).partition(said)[0]
    return re.sub("</?think>", "", header)  # where templates cut a content in two


def _sayable(draw: Draw, words: str) -> str:
    """Words that the template leaves alone within a content: these, these with single blanks, or others."""
    asked, said = (chr(c) for c in PRIVATE_USE[-2:])
    blank = draw([_user(asked), _assistant(said)])
    for candidate in (words, " ".join(words.split())):
        content = f"{candidate}a{candidate}b"
        as_said = (blank.replace(said, trim(content)) for trim in TRIMS)
        if any(_writes(draw, [_user(asked), _assistant(content)], text) for text in as_said):
            return candidate
    return "assistant"


def _tool_chat(answer: str) -> list[dict[str, Any]]:
    call = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"key": "x"}}}
    return [
        _user("What is x?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": answer},
        _assistant("x is 3."),
    ]


def _dropped(draw: Draw) -> frozenset[str]:
    """Roles that the template takes without a word and leaves out; "tool_calls" likewise."""
    said = {
        "system": ([_message("system", "Pegboxes"), _user("Who?"), _assistant("Me.")], "Pegboxes"),
        "tool": (_tool_chat("Pegboxes"), "Pegboxes"),
        "tool_calls": (_tool_chat("Pegboxes"), "look_up"),
    }
    return frozenset(name for name, (chat, word) in said.items() if not _writes(draw, chat, word))


def _writes(draw: Draw, chat: Sequence[Message], word: str) -> bool:
    try:
        return word in draw(chat)
    except RowError:
        return True  # a refusal is not silence


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _user(content: str) -> dict[str, Any]:
    return _message("user", content)


def _assistant(content: str) -> dict[str, Any]:
    return _message("assistant", content)


def _check_probe(draw: Draw, proof: TemplateProof, chat: Sequence[Message]) -> None:
    """Raise `RowError` unless the tokens trained are the template's own and hold what the probe is known to say."""
    rendered = render(chat, draw.tokenizer, proof)
    encoding = draw.tokenizer([rendered.text], add_special_tokens=False).encodings[0]
    if rendered.text != draw(chat) or encoding.ids != draw.ids(chat):
        raise RowError("changed text", "tokens differ from apply_chat_template's")
    if encoding.ids[:2] == [draw.tokenizer.bos_token_id] * 2:
        raise RowError("doubled BOS", "the template writes the start token twice")
    ranges = trained_tokens(encoding.offsets, rendered.text, rendered.turns)
    for turn, tokens in zip(rendered.turns, ranges, strict=True):
        _check_turn(proof, chat, rendered.text, turn, encoding.offsets, tokens)
    _check_ends(draw, proof, chat, rendered)


def _check_turn(
    proof: TemplateProof,
    chat: Sequence[Message],
    text: str,
    turn: Turn,
    offsets: Sequence[tuple[int, int]],
    tokens: range,
) -> None:
    message = chat[turn.message]
    # From the token before, as some tokenizers leave blanks out; or from a character that the two share.
    edge = min(offsets[tokens.start - 1][1], offsets[tokens.start][0]) if tokens and tokens.start else 0
    got = text[edge : offsets[tokens[-1]][1]] if tokens else ""
    if message.get("tool_calls"):
        fits = "look_up" in got and turn.closed
        wanted = "the tool call and the end of turn"
    else:
        closing = proof.last_closing if turn.message == len(chat) - 1 else proof.closing
        contents = [trim(message["content"]) for trim in TRIMS]
        wants = [lead + content + closing for lead in proof.leads or ("",) for content in contents]
        wanted = repr(wants[0])
        fits = any(_same(got, want, offsets[tokens.start][1] - edge) for want in wants) if tokens else False
    if not fits:
        raise RowError("wrong mask", f"it trains {got!r} where the assistant wrote {wanted}")


def _same(got: str, want: str, first: int) -> bool:
    """Equal, but for blank of the header that the first token, `first` characters long, joins to the first word."""
    extra = len(got) - len(want)
    return 0 <= extra < max(first, 1) and got.endswith(want) and not got[:extra].strip()


def _check_ends(draw: Draw, proof: TemplateProof, chat: Sequence[Message], rendered: Rendered) -> None:
    """The last turn begins where the prompt for it ends, and no end token is left after it."""
    last = rendered.turns[-1]
    prompt = draw(chat[:-1], prompt=True)
    if proof.by == "sentinels" and proof.prompted and rendered.text.startswith(prompt) and last.start != len(prompt):
        raise RowError("wrong mask", f"the last turn begins {last.start - len(prompt):+d} characters from its prompt")
    if draw.tokenizer.eos_token and draw.tokenizer.eos_token in rendered.text[last.stop :]:
        raise RowError("wrong mask", f"{draw.tokenizer.eos_token!r} after the last turn is not trained")
