"""Direct Preference Optimization: Your Language Model is Secretly a Reward Model
(Rafailov et al., 2023), arXiv:2305.18290.

    r(y) = log p(y | x) - log p_ref(y | x)        d = r(chosen) - r(rejected)        p_ref: the model before training

sigmoid    -log sigmoid(beta d); with label_smoothing s, -(1-s) log sigmoid(beta d) - s log sigmoid(-beta d)
           (conservative DPO, https://ericmitchell.ai/cdpo.pdf)
hinge      max(0, 1 - beta d)        (SLiC, arXiv:2305.10425, as in arXiv:2309.06657)
robust     (-(1-s) log sigmoid(beta d) + s log sigmoid(-beta d)) / (1 - 2s)        (arXiv:2403.00409)

The reference is the tuned model with its adapter off, so that no second model is in memory; or a model of its own; or
log-probabilities computed before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import SettingsError
from pegbox.core.settings import setting
from pegbox.objectives.answers import count_pairs, halves, reference_log_probs, score
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions
from pegbox.objectives.preference import Referred, measure, scores, terms, uncertain


@dataclass(frozen=True, kw_only=True)
class DPO(Referred):
    """What `objective.KEY` sets."""

    loss: Literal["sigmoid", "hinge", "robust"] = setting("sigmoid", "how a pair's loss falls with its margin")
    label_smoothing: float = setting(0.0, "share of pairs thought to be the wrong way round", at_least=0, below=0.5)

    def check(self) -> None:
        if self.loss == "hinge" and self.label_smoothing:
            raise SettingsError("objective dpo: label_smoothing is for loss=sigmoid and loss=robust, not for hinge")


DEFAULTS = DPO()


def pair_losses(margin: Tensor, settings: DPO) -> Tensor:
    """Losses (P,) of pairs from d (P,)."""
    scaled, smoothing = settings.beta * margin, settings.label_smoothing
    if settings.loss == "hinge":
        return torch.relu(1.0 - scaled)
    if settings.loss == "robust":
        right, wrong = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
        return ((1.0 - smoothing) * right - smoothing * wrong) / (1.0 - 2.0 * smoothing)
    return uncertain(scaled, smoothing)


def dpo(
    model: nn.Module,
    batch: Batch,
    *,
    settings: DPO = DEFAULTS,
    reference: nn.Module | None = None,
    num_items: Tensor | float | None = None,
) -> Losses:
    """The loss of a batch of pairs.

    Args:
        model: a tuned model, or any where the reference is given otherwise
        batch: pairs, see `pegbox.objectives.answers`; `reference_log_probs` (2P,) where they are known already
        reference: a model to compare with; the tuned model with its adapter off if None
        num_items: what the sum of the losses is divided by; P if None

    Returns:
        `dpo`, and `aux` where the model has routers.

    Raises:
        MethodError: the method trains the base, which is then no reference.  ModelError: there is no adapter.
    """
    before = reference_log_probs(model, batch, reference, "dpo")
    answers, output = score(model, batch)
    chosen, rejected = halves(answers.sums - before)
    losses = pair_losses(chosen - rejected, settings)
    return terms(model, output, {"dpo": losses}, count_pairs(batch), num_items)


@torch.no_grad()
def predict(
    model: nn.Module, batch: Batch, *, settings: DPO = DEFAULTS, reference: nn.Module | None = None
) -> Predictions:
    """Of each pair (P,): its `losses`, and the rewards beta r of its answers, `chosen` and `rejected`."""
    ratios = score(model, batch)[0].sums - reference_log_probs(model, batch, reference, "dpo")
    chosen, rejected = halves(ratios)
    return scores(pair_losses(chosen - rejected, settings), settings.beta * chosen, settings.beta * rejected)


def count(batch: Batch, **_: Any) -> Tensor:
    """P."""
    return count_pairs(batch)


OBJECTIVE = Objective(
    "dpo", dpo, count, predict, measure, best="reward_accuracy", higher_is_better=True, settings=DPO, refers=True
)
