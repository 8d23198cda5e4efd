"""The faults that `check` looks for: how grave each is, what it says, what to do; and the tests of a single row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pegbox.data import images
from pegbox.data.identity import surface
from pegbox.data.rejects import RowError

Example = Mapping[str, Any]
Message = Mapping[str, Any]
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Fault:
    severity: Severity  # error: the run would be wrong; warning: it would be worse; note: worth knowing
    says: str
    do: str


FAULTS: dict[str, Fault] = {
    "rejected": Fault("warning", "rows were rejected when read", "see the file of rejected rows for line and reason"),
    "unencodable": Fault("warning", "rows would be rejected when tokenised", "mend them or drop them"),
    "target-cut": Fault(
        "error", "rows lose their whole target to max_length", "raise max_length, shorten prompts, or truncate left"
    ),
    "end-untrained": Fault(
        "error",
        "rows do not train the token that ends the answer: the model would not learn to stop",
        "use a chat template that closes the assistant's turn, or add the end-of-sequence token",
    ),
    "truncated": Fault("warning", "rows are cut at max_length", "raise max_length, or split long rows"),
    "unknown-tokens": Fault(
        "warning", "rows hold tokens the tokenizer does not know", "use a tokenizer made for this language or script"
    ),
    "special-in-text": Fault(
        "warning",
        "rows spell out special tokens in their text",
        "remove the markers: the template adds its own, and a row with both has a doubled or forged turn",
    ),
    "empty-target": Fault("error", "rows have an empty answer or text", "fill it in, or drop these rows"),
    "empty-prompt": Fault("warning", "rows have an empty question or input", "fill it in, or drop these rows"),
    "role-order": Fault(
        "warning",
        "conversations have turns out of order",
        "expected: system first, user and assistant in turn, tool after a tool call, the assistant last",
    ),
    "unreadable-image": Fault("error", "rows have an image that cannot be read", "mend the files, or drop these rows"),
    "encoding": Fault(
        "warning",
        "rows hold a byte-order mark, a replacement character, or UTF-8 that was read as another encoding",
        "read the original again as UTF-8",
    ),
    "very-long": Fault("warning", "rows are far longer than the rest", "look whether they hold several examples"),
    "duplicate": Fault("warning", "rows repeat an earlier one (case and spacing aside)", "drop the repeats"),
    "near-duplicate": Fault("note", "rows nearly repeat an earlier one", "drop them if they add nothing"),
    "leak": Fault("error", "validation rows are also in the training rows", "drop them from training"),
    "near-leak": Fault("warning", "validation rows nearly repeat a training row", "drop their likes from training"),
    "prompt-leak": Fault(
        "warning", "validation rows ask what a training row asks", "split by prompt, as pegbox.data.examples.split does"
    ),
    "label-conflict": Fault("warning", "rows have the text of another row, and another label", "decide on one label"),
    "label-spelling": Fault("error", "rows spell a class another way than most", "give each class one spelling"),
    "label-unseen": Fault("error", "validation rows have a class that training has not", "add rows of the class"),
    "label-single": Fault("error", "rows have all the same label", "add rows of other classes"),
    "label-imbalance": Fault(
        "note", "rows are of one class, nine tenths or more of all", "report scores per class; accuracy says little"
    ),
}

BROKEN = re.compile("[\ufeff\ufffd]")
# UTF-8 read as Windows-1252 or Latin-1: a lead byte's letter, then the characters of continuation bytes. Pairs that
# real text holds too (French puts a no-break space and a guillemet after a letter) count only where several meet.
NEXT = "[\u0080-\u00bf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore") + "]"
MOJIBAKE = re.compile(
    "\u00c2[\u00a0\u00a3\u00a9\u00ae\u00b0\u00b2\u00b7\u00bd]"  # no-break space, pound, copyright, degree, ...
    "|\u00c3[\u0080-\u009f\u00a1-\u00aa\u00ac-\u00b9\u00bc-\u00bf\u20ac\u2030\u0160\u0161]"  # accented Latin
    f"|\u00e2[\u0080-\u008b\u20ac\u201a\u201e\u2020\u2021\u02c6]{NEXT}"  # quotation marks, dashes, arrows
    f"|(?:[\u00c4-\u00df]{NEXT}){{2,}}|(?:[\u00e0-\u00ef]{NEXT}{{2}}){{2,}}|\u00f0{NEXT}{{3}}"  # Cyrillic, CJK, emoji
)


def empty_target(example: Example) -> bool:
    """No answer where one is trained."""
    if "text" in example:
        return _blank(example["text"])
    return any(
        _role(turn) == "assistant"
        and turn.get("train", True)
        and _blank(turn["content"])
        and not turn.get("tool_calls")
        for part in ("messages", "chosen", "rejected", "completion")
        for turn in example.get(part, ())
    )


def empty_prompt(example: Example) -> bool:
    turns = [turn for part in ("messages", "prompt") for turn in example.get(part, ())]
    return any(_role(turn) == "user" and _blank(turn["content"]) for turn in turns) or _blank(
        example.get("text_pair", "-")
    )


def roles_out_of_order(example: Example) -> bool:
    if "messages" in example:
        turns = example["messages"]
        return not _in_order(turns) or ("label" not in example and _role(turns[-1]) != "assistant")
    answers = [example[part] for part in ("chosen", "rejected", "completion") if part in example]
    return any(not _in_order([*example["prompt"], *answer], bare=not example["prompt"]) for answer in answers)


def badly_encoded(example: Example) -> bool:
    """A byte-order mark, U+FFFD, or text that turns into other text when its bytes are read as UTF-8."""
    text = surface(example)
    if text.isascii() or "input_ids" in example:
        return False
    return bool(BROKEN.search(text) or MOJIBAKE.search(text))


def unreadable(example: Example) -> bool:
    """An image that is not there, or is none."""
    if "image" not in example:
        return False
    try:
        images.opened(example["image"])
    except RowError:
        return True
    return False


ROW_TESTS: dict[str, Callable[[Example], bool]] = {
    "empty-target": empty_target,
    "empty-prompt": empty_prompt,
    "role-order": roles_out_of_order,
    "unreadable-image": unreadable,
    "encoding": badly_encoded,
}


def spells_out(example: Example, special: Iterable[str]) -> bool:
    """Whether the text of a row holds one of the tokenizer's special tokens, letter by letter."""
    text = "" if "input_ids" in example else surface(example)
    return any(token in text for token in special)


def _blank(text: str) -> bool:
    return not text.strip()


def _role(turn: Message) -> str:
    return str(turn["role"])


FOLLOWS = {  # role -> the roles it may come after; "" is the start
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def _in_order(turns: Sequence[Message], bare: bool = False) -> bool:
    """`bare`: a conversation without a prompt may open with the assistant."""
    last, called = "user" if bare else "", False
    for turn in turns:
        role = _role(turn)
        if last not in FOLLOWS[role] or (role == "tool" and last == "assistant" and not called):
            return False
        last, called = role, bool(turn.get("tool_calls"))
    return True
