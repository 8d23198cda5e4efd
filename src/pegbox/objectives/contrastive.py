"""Contrastive learning of two towers: CLIP (Radford et al., 2021), arXiv:2103.00020.

    z_ij = exp(s) <a_i, b_j>            a, b: embeddings of B images and their B texts, on the unit sphere
    ce   = (mean_i -log softmax_j(z_i.)[i] + mean_j -log softmax_i(z_.j)[j]) / 2

The other rows of a batch are what a row is told from, so the loss of a batch is not that of its halves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import DataError
from pegbox.objectives import metrics
from pegbox.objectives.batch import field, model_inputs
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions

NEAREST = 5  # of `recall_at_5`


def contrastive(
    model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, num_items: Tensor | float | None = None
) -> Losses:
    """Symmetric cross-entropy of each image among the texts, and of each text among the images.

    Args:
        model: answers with `logits_per_image` (B, B), as transformers' CLIP and SigLIP do, as it is or wrapped
        batch: `input_ids` (B, T), `pixel_values` (B, 3, H, W), row by row one pair, and what else the model takes
        label_smoothing: share of the target spread evenly over the others
        num_items: what the sum over pairs is divided by, see `count`; the batch's own count if None

    Returns:
        `ce`.

    Raises:
        DataError: no pairs in the batch, or a model that gives no such logits.
    """
    z = _logits(model(**model_inputs(model, batch)))  # (B, B)
    own = torch.arange(len(z), device=z.device)
    total = torch.stack([F.cross_entropy(t, own, label_smoothing=label_smoothing, reduction="sum") for t in (z, z.T)])
    return {"ce": total.mean() / (count(batch) if num_items is None else num_items)}


def count(batch: Batch, **_: Any) -> Tensor:
    """Pairs: what a mean divides by."""
    texts = field(batch, "input_ids", "contrastive learning")
    field(batch, "pixel_values", "contrastive learning")
    return torch.tensor(float(len(texts)), device=texts.device)


def _logits(out: Any) -> Tensor:
    if getattr(out, "logits_per_image", None) is None:
        raise DataError("the model gives no logits_per_image; contrastive learning needs a model of two towers")
    return out.logits_per_image.float()


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Predictions:
    """`images` and `texts` (B, d), on the unit sphere."""
    out = model(**model_inputs(model, batch))
    _logits(out)
    return {name: F.normalize(getattr(out, f"{name[:-1]}_embeds").float(), dim=-1) for name in ("images", "texts")}


def measure(predictions: Predictions) -> dict[str, float]:
    """`recall_at_1` and `recall_at_5` among all pairs, each the mean of both directions; chance is k / n."""
    z = predictions["images"] @ predictions["texts"].T  # (n, n)
    return {
        f"recall_at_{k}": (metrics.recall_of_own(z, k) + metrics.recall_of_own(z.T, k)) / 2
        for k in (1, min(NEAREST, len(z)))
    }


OBJECTIVE = Objective("contrastive", contrastive, count, predict, measure, best="recall_at_1", higher_is_better=True)
