"""Metrics: pure functions of what a model predicted and what was true, over a whole evaluation set."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of rows predicted exactly: (n,) classes, or (n, C) sets of them; nan for none."""
    right = predicted == labels
    return (right if right.ndim == 1 else right.all(1)).double().mean().item()


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), of classes that are predicted or true somewhere.

    Args:
        predicted, labels: (n,) classes, or (n, C) of 0 and 1

    Returns:
        0 to 1; nan if no class occurs.
    """
    if labels.ndim == 1:
        predicted, labels = _indicators(predicted, labels)
    predicted, labels = predicted.bool(), labels.bool()
    hits = (predicted & labels).sum(0).double()  # (C,)
    named = predicted.sum(0).double() + labels.sum(0).double()  # 2 TP + FP + FN
    return (2.0 * hits / named)[named > 0].mean().item()


def _indicators(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (n,) as sets (n, C) of one."""
    if not len(labels):
        return predicted[:, None], labels[:, None]
    classes = int(torch.maximum(predicted.max(), labels.max())) + 1
    return F.one_hot(predicted, classes), F.one_hot(labels, classes)


def mse(predicted: Tensor, labels: Tensor) -> float:
    """Mean squared error of two tensors of one shape."""
    return (predicted.double() - labels.double()).square().mean().item()


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Linear correlation, -1 to 1, of (n,), or the mean over the K of (n, K); nan where one side is constant."""
    x, y = _centred(predicted), _centred(labels)
    return ((x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()).mean().item()


def _centred(values: Tensor) -> Tensor:
    values = values.double()
    constant = values.amax(0) == values.amin(0)  # its mean need not round to itself
    return torch.where(constant, torch.zeros_like(values), values - values.mean(0))


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of ranks, -1 to 1; equal values share their mean rank.  (n,) or (n, K) as for `pearson`."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the first dimension, equal values their mean rank: (n,) or (n, K), float64."""
    if values.ndim == 2:
        return torch.stack([ranks(column) for column in values.unbind(1)], 1)
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()  # the highest rank in each group of equal values
    return (last - (sizes.double() - 1.0) / 2.0)[group]


def nll(losses: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood a token, in nats, of sums of losses (n,) over numbers of tokens (n,); nan for none."""
    return (losses.double().sum() / tokens.double().sum()).item()


def perplexity(nll: float) -> float:
    """exp(nll), infinite where that overflows."""
    return math.exp(nll) if nll < 700.0 else math.inf


def recall_of_own(scores: Tensor, k: int) -> float:
    """Share of rows i of (n, n) scores whose own column i is among the k highest; a tie counts against it."""
    own = scores.diagonal()[:, None]
    better = (scores >= own).sum(1) - 1
    return (better < k).double().mean().item()


def delta_m(scores: Mapping[str, float], single: Mapping[str, float], lower: Collection[str] = ()) -> float:
    """Mean over tasks of the relative change from models of one task each, in percent; above 0 is better.

    Vandenhende et al., 2020, arXiv:2004.13379, as MTLoRA (arXiv:2403.20320) reports it.

    Args:
        scores: of one model for all tasks, by task.
        single: of the models of one task, by the same names.
        lower: tasks whose scores are better when lower, errors say.
    """
    gains = [(scores[task] / single[task] - 1) * (-1 if task in lower else 1) for task in single]
    return 100 * sum(gains) / len(gains)
