"""Token classification: one class of C for every labelled token.

ce = sum_t c_{y_t} * -log softmax(z_t)[y_t] / sum_t c_{y_t}      over tokens t whose label is not -100
"""

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
from pegbox.objectives.sequence_classification import ClassWeights, as_weights

IGNORED = -100


def token_classification(
    model: nn.Module,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights = None,
    num_items: Tensor | float | None = None,
) -> Losses:
    """Cross-entropy of the labelled tokens.

    Args:
        model: returns logits (B, T, C), as it is or wrapped
        batch: the model's arguments, and `labels` (B, T), -100 where a token has none
        label_smoothing: share of the target spread evenly over the classes
        class_weights: C factors of the classes' losses
        num_items: what the sum of the losses is divided by, see `count`; the batch's own count if None.
            A batch without a label has loss 0.

    Returns:
        `ce`.

    Raises:
        DataError: no `labels`, or not one for each token.
        SettingsError: not one class weight a class.
    """
    labels = field(batch, "labels", "token classification")
    logits = _logits(model, batch, labels)
    weights = as_weights(class_weights, logits)
    total = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        weight=weights,
        label_smoothing=label_smoothing,
        ignore_index=IGNORED,
        reduction="sum",
    )
    if num_items is None:
        items = count(batch, class_weights=weights)
        num_items = torch.where(items == 0, torch.ones_like(items), items)
    return {"ce": total / num_items}


def count(batch: Batch, class_weights: ClassWeights = None, **_: Any) -> Tensor:
    """Labelled tokens, or the sum of their classes' weights: what a mean divides by."""
    labels = field(batch, "labels", "token classification")
    labels = labels[labels != IGNORED]
    if class_weights is None:
        return torch.tensor(float(len(labels)), device=labels.device)
    return torch.as_tensor(class_weights, dtype=torch.float32, device=labels.device)[labels].sum()


def _logits(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    """Logits (B, T, C) of the tokens that labels (B, T) are for; virtual tokens before them are cut off."""
    logits = logits_of(model(**model_inputs(model, batch))).float()
    if logits.ndim != 3 or logits.shape[0] != labels.shape[0] or logits.shape[1] < labels.shape[-1]:
        raise DataError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; expected one a token")
    return logits[:, -labels.shape[1] :]


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Predictions:
    """Of the labelled tokens of the batch, n: `predictions` (n,), `labels` (n,) and `losses` (n,)."""
    labels = field(batch, "labels", "token classification")
    logits, at = _logits(model, batch, labels), labels != IGNORED
    losses = F.cross_entropy(logits[at], labels[at], reduction="none")
    return {"predictions": logits[at].argmax(-1), "labels": labels[at], "losses": losses}


def measure(predictions: Predictions) -> dict[str, float]:
    """`accuracy` and `macro_f1` over tokens, and `nll` a token."""
    chosen, labels = predictions["predictions"], predictions["labels"]
    return {
        "accuracy": metrics.accuracy(chosen, labels),
        "macro_f1": metrics.macro_f1(chosen, labels),
        "nll": predictions["losses"].mean().item(),
    }


OBJECTIVE = Objective(
    "token_classification",
    token_classification,
    count,
    predict,
    measure,
    best="macro_f1",
    higher_is_better=True,
)
