"""A linear probe on the frozen model's features: what a tuned classifier has to beat, and where it may start.

It is logistic regression (scikit-learn) on what the model's head reads, or, where that is a state for every token, on
its mean over the tokens; C is chosen on rows that are held out.  As W and b of the head it is the warm start of
Kumar et al. (2022), arXiv:2202.10054: a random head distorts good features while it is being learned.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pegbox import anatomy
from pegbox.core.errors import DataError, MissingExtra, ModelError
from pegbox.objectives.batch import model_inputs

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # scikit-learn's C, of features with a mean variance of 1
ROUNDS = 300  # of L-BFGS
ROWS_AT_ONCE = 64  # of one forward


@dataclass(frozen=True)
class Features:
    """What the head reads for each row, (N, D) float32, and the rows' classes (N,)."""

    values: Tensor
    labels: Tensor

    def where(self, chosen: Tensor) -> Features:
        """The rows of a mask (N,)."""
        return Features(self.values[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Probe:
    """A linear classifier on features.

    Attributes:
        weight, bias: (C, D), (C,), of the features as they are.
        penalty: the C that the held-out rows chose.
        seconds: for all fits.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    seconds: float = 0.0

    def logits(self, values: Tensor) -> Tensor:
        """(N, D) -> (N, C)"""
        return values @ self.weight.T + self.bias

    def loss(self, held: Features) -> float:
        """Mean cross-entropy of the rows' classes."""
        return float(nn.functional.cross_entropy(self.logits(held.values), held.labels))

    def accuracy(self, held: Features) -> float:
        """The share of rows that it puts into their class."""
        return float(self.logits(held.values).argmax(-1).eq(held.labels).float().mean())


@torch.no_grad()
def features(model: nn.Module, rows: Sequence[Any], collate: Callable[[Sequence[Any]], Any]) -> Features:
    """Run the frozen model and keep what goes into its head.

    Raises:
        ModelError: the model has no head that its anatomy knows.
    """
    seen: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda _, given: seen.append(given[0].float().cpu()))
    kept, labels, was_training = [], [], model.training
    model.eval()
    try:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = collate(rows[start : start + ROWS_AT_ONCE])
            labels.append(batch["labels"])
            model(**model_inputs(model, batch))
            kept.append(_one_a_row(seen.pop(), batch.get("attention_mask")))
    finally:
        handle.remove()
        model.train(was_training)
    return Features(torch.cat(kept), torch.cat(labels))


def head(model: nn.Module) -> nn.Module:
    """The classifier.

    Raises:
        ModelError: the model has none that its anatomy knows.
    """
    path = anatomy.of(model).head
    if path is None:
        raise ModelError(f"a {type(model).__name__} has no head to take features from or to start")
    return model.get_submodule(path)


def _one_a_row(state: Tensor, mask: Tensor | None) -> Tensor:
    """(B, D) as it is; (B, T, D) as its mean over the tokens."""
    if state.ndim == 2:
        return state
    weights = torch.ones(state.shape[:2]) if mask is None else mask.float().cpu()
    return (state * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


def linear_probe(train: Features, valid: Features | None, classes: int) -> Probe:
    """Fit one logistic regression for each of PENALTIES, and keep the one of the lowest loss on validation rows.

    The loss, since a hundred validation rows rank six fits by accuracy at random.

    Without validation rows C is chosen on every fifth training row, and the probe fitted again on all of them.

    Raises:
        MissingExtra: scikit-learn is not installed.
        DataError: all rows are of one class.
    """
    start = time.perf_counter()
    if valid is None:
        held = torch.arange(len(train.labels)) % 5 == 0
        rest, penalty = train.where(~held), 1.0
        if len(rest.labels.unique()) > 1:
            penalty = linear_probe(rest, train.where(held), classes).penalty
        return replace(_probes(train, (penalty,), classes)[0], seconds=time.perf_counter() - start)
    probes = _probes(train, PENALTIES, classes)
    best = min(probes, key=lambda probe: probe.loss(valid))
    return replace(best, seconds=time.perf_counter() - start)


def _probes(train: Features, penalties: Sequence[float], classes: int) -> list[Probe]:
    centre, spread = train.values.mean(0), train.values.std()  # one scale for all, so that no direction is blown up
    scaled, probes = (train.values - centre) / spread, []
    for penalty in penalties:
        weight, bias = _fit(scaled, train.labels, penalty, classes)
        weight = weight / spread
        probes.append(Probe(weight, bias - weight @ centre, penalty))
    return probes


def _fit(values: Tensor, labels: Tensor, penalty: float, classes: int) -> tuple[Tensor, Tensor]:
    """(N, D), (N,) -> weight (C, D), bias (C,); classes that never occur get a bias that rules them out."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtra("scikit-learn", "demo", "the linear probe") from error
    if len(labels.unique()) < 2:
        raise DataError(f"a linear probe tells classes apart, and all {len(labels)} training rows are of one class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(C=penalty, max_iter=ROUNDS).fit(values.numpy(), labels.numpy())
    found = torch.from_numpy(fit.classes_).long()
    coefficients, offsets = torch.from_numpy(fit.coef_).float(), torch.from_numpy(fit.intercept_).float()
    if len(found) == 2:  # scikit-learn keeps one row for two classes
        coefficients, offsets = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-offsets, offsets]) / 2
    weight, bias = torch.zeros(classes, values.shape[1]), torch.full((classes,), -10.0)
    weight[found], bias[found] = coefficients, offsets
    return weight, bias


def put(probe: Probe, head: nn.Module) -> None:
    """Start a linear head from the probe.

    Raises:
        ModelError: the head is not linear, or reads other features.
    """
    if not isinstance(head, nn.Linear) or head.weight.shape != probe.weight.shape:
        shape = tuple(probe.weight.shape)
        raise ModelError(f"warm_start needs a linear head of shape {shape}, this model's is {head}; warm_start=false")
    with torch.no_grad():
        head.weight.copy_(probe.weight)
        if head.bias is not None:
            head.bias.copy_(probe.bias)
