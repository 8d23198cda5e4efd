"""Rows in, batches of tensors out.  B rows, T tokens, C classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox.core.errors import SettingsError
from pegbox.data.encoded import IGNORE, Encoded, EncodedLabel, EncodedPair
from pegbox.data.packing import Packed

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class PadCollator:
    """`input_ids, attention_mask, labels`, (B, T) each, padded on the right; for language models and for tagging.

    Args:
        pad_token_id: fills `input_ids`; labels there are -100, the mask 0.
        pad_to_multiple_of: T is rounded up to one.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        width = _width([len(row) for row in rows], self.pad_to_multiple_of)
        return {
            "input_ids": _padded([row.input_ids for row in rows], width, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], width, 0),
            "labels": _padded([row.labels for row in rows], width, IGNORE),
        }


@dataclass(frozen=True)
class PackedCollator:
    """`input_ids, position_ids, labels`, (B, T) each, and no mask: packed rows, padded at the end.

    Padding is a segment of its own, with positions from 0 and labels -100, so that nothing attends to it.  The model
    has to be called with `use_cache=False`, or transformers takes the batch for the start of a generation and lets
    examples see each other.

    Args: as of `PadCollator`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Packed]) -> Batch:
        width = _width([len(row) for row in rows], self.pad_to_multiple_of)
        return {
            "input_ids": _padded([row.input_ids for row in rows], width, self.pad_token_id),
            "position_ids": _padded([[*row.position_ids, *range(width - len(row))] for row in rows], width, 0),
            "labels": _padded([row.labels for row in rows], width, IGNORE),
        }


@dataclass(frozen=True)
class LabelCollator:
    """`input_ids, attention_mask` and, of BERT's kind, `token_type_ids`, (B, T) each, with `labels`.

    Labels are (B,) class numbers, (B,) float32 targets, or (B, C) float32 of several labels a row.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedLabel]) -> Batch:
        import torch

        width = _width([len(row) for row in rows], self.pad_to_multiple_of)
        whole = all(isinstance(row.label, int) for row in rows)
        batch = {
            "input_ids": _padded([row.input_ids for row in rows], width, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], width, 0),
            "labels": torch.tensor([row.label for row in rows], dtype=torch.long if whole else torch.float32),
        }
        kinds = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if kinds:
            batch["token_type_ids"] = _padded(kinds, width, 0)
        return batch


@dataclass(frozen=True)
class PairCollator:
    """As `PadCollator`, (2B, T) each: rows 0 to B-1 are the chosen answers, B to 2B-1 the rejected, in that order."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedPair]) -> Batch:
        collate = PadCollator(self.pad_token_id, self.pad_to_multiple_of)
        return collate([row.chosen for row in rows] + [row.rejected for row in rows])


def length_grouped(lengths: Sequence[int], batch_size: int, *, seed: int, window: int = 32) -> list[list[int]]:
    """Batches of indices whose rows are of similar length, in random order; every index once, the last batch short.

    Args:
        window: batches that are sorted together; 1 is plain shuffling, more pads less and mixes less.
    """
    if batch_size < 1 or window < 1:
        raise SettingsError(f"batch_size is {batch_size} and window {window}, must be at least 1")
    draw = random.Random(seed)
    order = draw.sample(range(len(lengths)), len(lengths))
    span = batch_size * window
    stretches = [sorted(order[i : i + span], key=lambda j: -lengths[j]) for i in range(0, len(order), span)]
    batches = [rows[i : i + batch_size] for rows in stretches for i in range(0, len(rows), batch_size)]
    draw.shuffle(batches)
    return batches


def _width(lengths: Sequence[int], multiple: int | None) -> int:
    return -(-max(lengths) // (multiple or 1)) * (multiple or 1)


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """Rows of up to `width` integers -> (B, width)."""
    import numpy
    import torch

    out = numpy.full((len(rows), width), fill, dtype=numpy.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
