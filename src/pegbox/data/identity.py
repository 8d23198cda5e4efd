"""What makes an example the same example: its id, its text, and the two fingerprints taken of them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from pegbox.data import images

Example = Mapping[str, Any]


def content_id(example: Example) -> str:
    """Sixteen hexadecimal digits of all that an example holds except its id; the same for the same row anywhere."""
    content = {key: value for key, value in example.items() if key != "id"}
    if "image" in example:
        content["image"] = images.mark(example["image"])
    return _digest(json.dumps(content, sort_keys=True, default=str))


class Ids:
    """Hands out ids, once each: a second `a` becomes `a-2`."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def unique(self, wanted: str) -> str:
        count = self._last.get(wanted, 0) + 1
        given = wanted if count == 1 else f"{wanted}-{count}"
        while count > 1 and given in self._last:
            count += 1
            given = f"{wanted}-{count}"
        self._last[wanted] = count
        self._last.setdefault(given, 1)
        return given


def surface(example: Example) -> str:
    """Every text of an example a reader would see, in order, a mark for an image; labels and tags are left out."""
    if "image" in example:
        return images.mark(example["image"])
    if "input_ids" in example:
        return " ".join(map(str, example["input_ids"]))
    if "tokens" in example:
        return " ".join(example["tokens"])
    if "text" in example:
        return "\n".join(example[key] for key in ("text", "text_pair") if key in example)
    parts = ("messages", "prompt", "chosen", "rejected", "completion")
    return "\n".join(line for part in parts for line in _said(example.get(part, ())))


def question(example: Example) -> str:
    """What an example asks: the prompt of a preference, all turns but the last of a chat; else all its text."""
    if "messages" in example and "label" not in example:
        return "\n".join(_said(example["messages"][:-1])) or surface(example)
    return "\n".join(_said(example.get("prompt", ()))) or surface(example)


def normalised(text: str) -> str:
    """Text with case, spacing and Unicode spelling evened out."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fingerprint(text: str) -> str:
    """Sixteen hexadecimal digits of the normalised text."""
    return _digest(normalised(text))


def _said(turns: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{turn['role']}: {turn['content']}{_called(turn)}" for turn in turns]


def _called(turn: Mapping[str, Any]) -> str:
    return json.dumps(turn["tool_calls"], default=str) if turn.get("tool_calls") else ""


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
