"""Sequence classification: one class of C a row, or any set of them.

single label: ce  = sum_i c_{y_i} * -log softmax(z_i)[y_i] / sum_i c_{y_i}          c: class weights, 1 by default
multi-label:  bce = sum_{i,k} c_k * -log p(y_ik | sigmoid(z_ik)) / (B * C)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import DataError, SettingsError
from pegbox.core.headless import logits_of
from pegbox.objectives import metrics
from pegbox.objectives.batch import field, model_inputs
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions

ClassWeights = Tensor | Sequence[float] | None


def sequence_classification(
    model: nn.Module,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights = None,
    num_items: Tensor | float | None = None,
) -> Losses:
    """Cross-entropy of one class a row, or of each class by itself.

    Args:
        model: returns logits (B, C), as it is or wrapped
        batch: the model's arguments, and `labels`: (B,) whole numbers for one class a row, or (B, C) of 0 and 1
        label_smoothing: share of the target spread evenly over the classes (for multi-label: towards 1/2)
        class_weights: C factors of the classes' losses
        num_items: what the sum of the losses is divided by, see `count`; the batch's own count if None

    Returns:
        `ce`, or `bce` for multi-label.

    Raises:
        DataError: no `labels`, or a shape that fits neither.
        SettingsError: not one class weight a class.
    """
    labels = field(batch, "labels", "sequence classification")
    logits = logits_of(model(**model_inputs(model, batch))).float()  # (B, C)
    weights = as_weights(class_weights, logits)
    _check(labels, logits)
    items = count(batch, class_weights=weights) if num_items is None else num_items
    if labels.ndim == 2:
        soft = labels.float() * (1.0 - label_smoothing) + 0.5 * label_smoothing
        total = F.binary_cross_entropy_with_logits(logits, soft, weight=weights, reduction="none").mean(1).sum()
        return {"bce": total / items}
    total = F.cross_entropy(logits, labels, weight=weights, label_smoothing=label_smoothing, reduction="sum")
    return {"ce": total / items}


def count(batch: Batch, class_weights: ClassWeights = None, **_: Any) -> Tensor:
    """Rows, or the sum of their classes' weights: what a mean divides by."""
    labels = field(batch, "labels", "sequence classification")
    if class_weights is None or labels.ndim == 2:
        return torch.tensor(float(len(labels)), device=labels.device)
    return torch.as_tensor(class_weights, dtype=torch.float32, device=labels.device)[labels].sum()


def as_weights(weights: ClassWeights, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != logits.shape[-1]:
        raise SettingsError(
            f"class_weights has {len(weights)} values, expected one for each of {logits.shape[-1]} classes"
        )
    return torch.as_tensor(weights, dtype=logits.dtype, device=logits.device)


def _check(labels: Tensor, logits: Tensor) -> None:
    whole = not labels.is_floating_point() and labels.shape == logits.shape[:1]
    if not whole and labels.shape != logits.shape:
        raise DataError(
            f"labels {tuple(labels.shape)} of {labels.dtype} do not fit logits {tuple(logits.shape)}; "
            f"expected whole numbers ({len(logits)},), or 0 and 1 in {tuple(logits.shape)}"
        )


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Predictions:
    """`logits` (B, C) and, where the batch has them, `labels`."""
    logits = logits_of(model(**model_inputs(model, batch))).float()
    return {"logits": logits} | ({"labels": batch["labels"]} if "labels" in batch else {})


def measure(predictions: Predictions) -> dict[str, float]:
    """`accuracy` (for multi-label, of whole rows), `macro_f1`, and `nll` a row."""
    logits, labels = predictions["logits"], predictions["labels"]
    if labels.ndim == 2:
        chosen: Tensor = (logits > 0).long()
        nll = F.binary_cross_entropy_with_logits(logits, labels.float()).item()
    else:
        chosen = logits.argmax(-1)
        nll = F.cross_entropy(logits, labels).item()
    return {"accuracy": metrics.accuracy(chosen, labels), "macro_f1": metrics.macro_f1(chosen, labels), "nll": nll}


OBJECTIVE = Objective(
    "sequence_classification",
    sequence_classification,
    count,
    predict,
    measure,
    best="accuracy",
    higher_is_better=True,
)
