"""Supervised fine-tuning on conversations: causal language modelling of what the assistant says.

Labels come from the data layer, or from a mask of the assistant's tokens: `assistant_masks` (transformers' chat
templates) or `completion_mask` (TRL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import DataError, did_you_mean
from pegbox.objectives import causal_lm as lm
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions

MASKS = ("assistant_masks", "completion_mask")


def sft(model: nn.Module, batch: Batch, **options: Any) -> Losses:
    """The next-token loss over the assistant's tokens.

    Args:
        batch: as for `causal_lm`; a mask (B, T), where there is one, narrows the labels, or makes them of `input_ids`
        options: as for `causal_lm`

    Raises:
        DataError: neither labels nor a mask.
    """
    return lm.causal_lm(model, supervised(batch), **options)


def supervised(batch: Batch) -> dict[str, Any]:
    """The batch with its masks put into its labels."""
    masks = [batch[name] for name in MASKS if batch.get(name) is not None]
    labels = batch.get("labels")
    if labels is None and not masks:
        raise DataError(f"sft needs 'labels' or one of {MASKS} in the batch{did_you_mean('labels', batch)}")
    labels = batch["input_ids"] if labels is None else labels
    for mask in masks:
        labels = torch.where(mask.bool(), labels, lm.IGNORED)
    return {**batch, "labels": labels}


def count(batch: Batch, **_: Any) -> Tensor:
    """The assistant's tokens, or the sum of their weights."""
    return lm.count(supervised(batch))


def predict(model: nn.Module, batch: Batch) -> Predictions:
    """As `causal_lm`'s, over the assistant's tokens."""
    return lm.predict(model, supervised(batch))


OBJECTIVE = Objective("sft", sft, count, predict, lm.measure, best="nll", higher_is_better=False)
