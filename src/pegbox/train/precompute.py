"""What a reference model thinks of a data set, asked once before training and kept with the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.headless import evaluating
from pegbox.objectives.answers import score
from pegbox.objectives.kto import MISMATCHED, mismatched_part

Batch = Mapping[str, Any]


@torch.no_grad()
def with_reference(
    rows: Sequence[Any], model: nn.Module, collate: Callable[[Sequence[Any]], Batch], batch_size: int
) -> list[Any]:
    """Rows of pairs or of unpaired answers, with the log-probabilities of their answers under `model`.

    Args:
        rows: `EncodedPair`s or `EncodedAnswer`s.
        model: before anything is put on it.
        collate: makes a padded batch of them.
        batch_size: rows of one forward.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of a batch of similar length
    found: list[Any] = list(rows)
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in chosen]).items()}
            for i, pair in zip(chosen, _both(model, batch).tolist(), strict=True):
                found[i] = replace(rows[i], reference=(pair[0], pair[1]))
    return found


def _both(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the two answers that belong together, (rows, 2): chosen and rejected, or own and
    mismatched."""
    own = score(model, batch)[0].sums
    if f"{MISMATCHED}input_ids" not in batch:
        return torch.stack(own.chunk(2), 1)
    return torch.stack([own, score(model, mismatched_part(batch))[0].sums], 1)
