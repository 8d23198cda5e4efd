"""Causal language modelling: every labelled token from the tokens before it.

    nll = sum_t w_t * -log p(label_t | tokens before t) / sum_t w_t        over tokens t whose label is not -100

A packed row holds several examples, whose `position_ids` start again at 0; nothing predicts an example's first token.
The logits of a whole batch are never made (see `pegbox.core.headless`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.headless import Head, through_head, unwrap
from pegbox.objectives import metrics
from pegbox.objectives.batch import field, model_inputs
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions

IGNORED = -100


def causal_lm(
    model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, num_items: Tensor | float | None = None
) -> Losses:
    """The next-token loss.

    Args:
        model: returns logits (B, T, V), as it is or wrapped
        batch: `input_ids` (B, T), `labels` (B, T) with -100 where nothing is learned, optionally `attention_mask`,
            `position_ids`, `token_weights` (B, T) of the labels, and whatever else the model takes
        label_smoothing: share of the target spread evenly over the vocabulary
        num_items: what the sum of the losses is divided by, see `count`; the batch's own count if None.
            A batch without a label has loss 0.

    Returns:
        `nll`, and `aux`, the balance loss of the model's routers, where it returns one; by the batch's share of
        `num_items`, if that is given.

    Raises:
        DataError: no `labels`.
    """
    labels, weights = targets(batch)

    def use(head: Head, hidden: Tensor) -> Tensor:
        return head.cross_entropy(
            hidden,
            labels,
            token_weights=weights,
            label_smoothing=label_smoothing,
            reduction="mean" if num_items is None else "sum",
        )

    total, output = through_head(model, model_inputs(model, batch), labels.shape[1], use)
    losses = {"nll": total if num_items is None else total / num_items}
    router = router_loss(model, output)
    if router is not None:
        losses["aux"] = router if num_items is None else router * count(batch) / num_items
    return losses


def count(batch: Batch, **_: Any) -> Tensor:
    """Labelled tokens that something predicts, or the sum of their weights: what a mean divides by."""
    labels, weights = targets(batch)
    labelled = labels != IGNORED
    return labelled.sum() if weights is None else (weights * labelled).sum()


def targets(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Labels and weights (B, T) of what each position predicts, the token after it; -100 where that is nothing."""
    labels = _next(field(batch, "labels", "a language-model loss"), IGNORED)
    positions, weights = batch.get("position_ids"), batch.get("token_weights")
    if positions is not None:
        starts = _next(positions, 1) == 0  # the next token is the first of another example
        labels = labels.masked_fill(starts, IGNORED)
    return labels, None if weights is None else _next(weights, 0)


def _next(values: Tensor, last: int) -> Tensor:
    """values[:, t + 1] at t, and `last` at the end: (B, T) -> (B, T)."""
    return F.pad(values[:, 1:], (0, 1), value=last)


def router_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The balance loss of a mixture of experts, weighted as the model's own config says."""
    loss = getattr(output, "aux_loss", None)
    factor = getattr(getattr(unwrap(model), "config", None), "router_aux_loss_coef", None)
    return None if loss is None or factor is None else loss * factor


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Predictions:
    """Per row: `nll` (B,), the sum of its tokens' losses, and `tokens` (B,), how many they are."""
    labels, _ = targets(batch)
    inputs = model_inputs(model, batch)
    losses, _ = through_head(model, inputs, labels.shape[1], lambda head, x: head.token_losses(x, labels))  # (B, T)
    return {"nll": losses.sum(1), "tokens": (labels != IGNORED).sum(1)}


def measure(predictions: Predictions) -> dict[str, float]:
    """`nll` a token, and `perplexity`."""
    nll = metrics.nll(predictions["nll"], predictions["tokens"])
    return {"nll": nll, "perplexity": metrics.perplexity(nll)}


OBJECTIVE = Objective("causal_lm", causal_lm, count, predict, measure, best="nll", higher_is_better=False)
