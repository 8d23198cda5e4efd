"""Layer ranges: which blocks a method touches."""

from __future__ import annotations

import re

from pegbox.core.errors import TargetError

_PART = re.compile(r"\s*(-?\d+)(?:-(-?\d+))?\s*")


def layer_indices(layers: str, count: int) -> set[int]:
    """The block indices that `layers` names, of `count` blocks.

    Args:
        layers: comma-separated indices and inclusive ranges: `0-5`, `0,3,7-9`.  In a range a negative index
            counts from the end, `-3--2` or `4--1`; alone it is that many from the end, `-2` the last two.

    Raises:
        TargetError: unreadable, reversed or out of range.
    """
    if not count:
        raise TargetError(f"layers {layers!r}: this model has no blocks to choose from")
    return {index for part in layers.split(",") for index in _range(part, layers, count)}


def _range(part: str, layers: str, count: int) -> range:
    read = _PART.fullmatch(part)
    if not read:
        raise TargetError(f"layers {layers!r}: {part!r} is not an index or a range; write 0-5, 0,3,7-9 or -3--1")
    first = _index(read[1], layers, count)
    alone = count - 1 if int(read[1]) < 0 else first
    last = _index(read[2], layers, count) if read[2] else alone
    if first > last:
        raise TargetError(f"layers {layers!r}: the range {part.strip()!r} runs backwards, from {first} to {last}")
    return range(first, last + 1)


def _index(text: str, layers: str, count: int) -> int:
    index = int(text)
    if not -count <= index < count:
        raise TargetError(f"layers {layers!r}: {index} is out of range; the model has {count} blocks, 0 to {count - 1}")
    return index % count
