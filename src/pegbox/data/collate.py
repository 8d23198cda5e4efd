"""Rows in, batches of tensors out.  B rows, T tokens, C classes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import SettingsError
from pegbox.data.encoded import IGNORE, Encoded, EncodedAnswer, EncodedLabel, EncodedPair, EncodedTarget
from pegbox.data.packing import Packed, PackedPairs

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
class TargetCollator:
    """`input_ids, attention_mask` (B, S) of the sources, `labels` (B, T) of the targets, each padded on the right.

    Args: as of `PadCollator`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedTarget]) -> Batch:
        source = _width([len(row.input_ids) for row in rows], self.pad_to_multiple_of)
        target = _width([len(row.labels) for row in rows], self.pad_to_multiple_of)
        return {
            "input_ids": _padded([row.input_ids for row in rows], source, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], source, 0),
            "labels": _padded([row.labels for row in rows], target, IGNORE),
        }


@dataclass(frozen=True)
class TaskCollator:
    """As another collator, with `task_ids` (B,), the number of each row's task.

    Args:
        collate: the other.
        tasks: of a row, by its id.
    """

    collate: Callable[[Sequence[Any]], Batch]
    tasks: Mapping[str, int]

    def __call__(self, rows: Sequence[Any]) -> Batch:
        import torch

        return {**self.collate(rows), "task_ids": torch.tensor([self.tasks[row.id] for row in rows])}


@dataclass(frozen=True)
class PairCollator:
    """As `PadCollator`, (2B, T) each: rows 0 to B-1 are the chosen answers, B to 2B-1 the rejected, in that order.

    With `margin` (B,) and `reference_log_probs` (2B,) where the rows have them.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedPair]) -> Batch:
        collate = PadCollator(self.pad_token_id, self.pad_to_multiple_of)
        return collate([row.chosen for row in rows] + [row.rejected for row in rows]) | _known(rows)


@dataclass(frozen=True)
class PackedPairCollator:
    """`input_ids, position_ids, labels, segments`, (B, T) each, and no mask, of packed preferences.

    Of P pairs in the batch, `segments` is 0 to P-1 on chosen answers, P to 2P-1 on rejected ones in the same order,
    and -1 in padding.  Otherwise as `PackedCollator` and `PairCollator`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[PackedPairs]) -> Batch:
        width = _width([len(row) for row in rows], self.pad_to_multiple_of)
        pairs = [pair for row in rows for pair in row.pairs]
        number = {id(pair): n for n, pair in enumerate(pairs)}
        lines = [
            [(side, number[id(pair)] + k * len(pairs)) for pair in row.pairs for k, side in enumerate(_both(pair))]
            for row in rows
        ]
        padding = [width - len(row) for row in rows]
        positions = [
            [*(at for a, _ in line for at in range(len(a))), *range(n)] for line, n in zip(lines, padding, strict=True)
        ]
        return {
            "input_ids": _padded(
                [[i for a, _ in line for i in a.input_ids] for line in lines], width, self.pad_token_id
            ),
            "position_ids": _padded(positions, width, 0),
            "labels": _padded([[i for a, _ in line for i in (IGNORE, *a.labels[1:])] for line in lines], width, IGNORE),
            "segments": _padded([[n for a, n in line for _ in range(len(a))] for line in lines], width, -1),
        } | _known(pairs)


def _both(pair: EncodedPair) -> tuple[Encoded, Encoded]:
    return pair.chosen, pair.rejected


@dataclass(frozen=True)
class AnswerCollator:
    """As `PadCollator`, of the answers, with `desirable` (B,) of 0 and 1; the same of the mismatched answers, their
    names beginning with `mismatched_`; and both `reference_log_probs` (B,) where the rows have them."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[EncodedAnswer]) -> Batch:
        import torch

        collate = PadCollator(self.pad_token_id, self.pad_to_multiple_of)
        batch = collate([row.answer for row in rows])
        batch["desirable"] = torch.tensor([int(row.desirable) for row in rows])
        batch |= {f"mismatched_{key}": value for key, value in collate([row.mismatched for row in rows]).items()}
        known = [row.reference for row in rows if row.reference is not None]
        if len(known) == len(rows):
            batch["reference_log_probs"], batch["mismatched_reference_log_probs"] = torch.tensor(known).unbind(1)
        return batch


def _known(pairs: Sequence[EncodedPair]) -> Batch:
    """What the data or a reference model says of P pairs: `margin` (P,), 0 where none is given, and
    `reference_log_probs` (2P,)."""
    import torch

    known: Batch = {}
    if any(pair.margin is not None for pair in pairs):
        known["margin"] = torch.tensor([pair.margin or 0.0 for pair in pairs])
    references = [pair.reference for pair in pairs if pair.reference is not None]
    if len(references) == len(pairs):
        known["reference_log_probs"] = torch.tensor(references).T.flatten()
    return known


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
