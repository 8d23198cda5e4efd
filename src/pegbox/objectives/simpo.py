"""SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng, Xia and Chen, 2024), arXiv:2405.14734.

    r(y) = beta log p(y | x) / |y|        loss = -log sigmoid(r(chosen) - r(rejected) - gamma)

|y| is the answer's length in tokens.  The paper finds beta of 2 to 2.5 and gamma / beta of 0.3 to 0.5 to do well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pegbox.core.settings import setting
from pegbox.objectives.answers import count_pairs, halves, score
from pegbox.objectives.dpo import count
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions, Settings
from pegbox.objectives.preference import measure, scores, terms, uncertain


@dataclass(frozen=True, kw_only=True)
class SimPO(Settings):
    """What `objective.KEY` sets."""

    beta: float = setting(2.0, "scale of the reward, a log-probability a token", above=0)
    gamma: float = setting(1.0, "margin by which the chosen reward should be higher", at_least=0)
    label_smoothing: float = setting(0.0, "share of pairs thought to be the wrong way round", at_least=0, below=0.5)


DEFAULTS = SimPO()


def pair_losses(margin: Tensor, settings: SimPO) -> Tensor:
    """Losses (P,) of pairs from the difference of their rewards (P,)."""
    return uncertain(margin - settings.gamma, settings.label_smoothing)


def simpo(
    model: nn.Module, batch: Batch, *, settings: SimPO = DEFAULTS, num_items: Tensor | float | None = None
) -> Losses:
    """The loss of a batch of pairs.

    Args:
        model: a language model, as it is or wrapped
        batch: pairs, see `pegbox.objectives.answers`
        num_items: what the sum of the losses is divided by; P if None

    Returns:
        `simpo`, and `aux` where the model has routers.
    """
    answers, output = score(model, batch)
    chosen, rejected = halves(settings.beta * answers.means)
    losses = pair_losses(chosen - rejected, settings)
    return terms(model, output, {"simpo": losses}, count_pairs(batch), num_items)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, settings: SimPO = DEFAULTS) -> Predictions:
    """Of each pair (P,): its `losses`, and the rewards of its answers, `chosen` and `rejected`."""
    chosen, rejected = halves(settings.beta * score(model, batch)[0].means)
    return scores(pair_losses(chosen - rejected, settings), chosen, rejected)


OBJECTIVE = Objective(
    "simpo", simpo, count, predict, measure, best="reward_accuracy", higher_is_better=True, settings=SimPO
)
