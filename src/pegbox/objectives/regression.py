"""Regression: mse = sum_i (z_i - y_i)^2 / n over the n numbers of a batch, one a row or several."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import DataError
from pegbox.core.headless import logits_of
from pegbox.objectives import metrics
from pegbox.objectives.batch import field, model_inputs
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions


def regression(model: nn.Module, batch: Batch, *, num_items: Tensor | float | None = None) -> Losses:
    """Mean squared error.

    Args:
        model: returns logits (B, K), as it is or wrapped
        batch: the model's arguments, and `labels` (B,) for K = 1, or (B, K)
        num_items: what the sum of squares is divided by, see `count`; the batch's own count if None

    Returns:
        `mse`.

    Raises:
        DataError: no `labels`, or not one number for each that the model gives.
    """
    labels = field(batch, "labels", "regression")
    values = _values(model, batch, labels)
    total = F.mse_loss(values, labels.float(), reduction="sum")
    return {"mse": total / (count(batch) if num_items is None else num_items)}


def count(batch: Batch, **_: Any) -> Tensor:
    """Numbers to be predicted: what a mean divides by."""
    labels = field(batch, "labels", "regression")
    return torch.tensor(float(labels.numel()), device=labels.device)


def _values(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    values = logits_of(model(**model_inputs(model, batch))).float()  # (B, K)
    if labels.ndim == 1 and values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.shape != labels.shape:
        raise DataError(f"labels {tuple(labels.shape)} do not fit the model's {tuple(values.shape)}")
    return values


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Predictions:
    """`predictions` and `labels`, both (B,) or (B, K)."""
    labels = field(batch, "labels", "regression")
    return {"predictions": _values(model, batch, labels), "labels": labels.float()}


def measure(predictions: Predictions) -> dict[str, float]:
    """`mse`, and the correlations `pearson` and `spearman`."""
    values, labels = predictions["predictions"], predictions["labels"]
    return {
        "mse": metrics.mse(values, labels),
        "pearson": metrics.pearson(values, labels),
        "spearman": metrics.spearman(values, labels),
    }


OBJECTIVE = Objective("regression", regression, count, predict, measure, best="mse", higher_is_better=False)
