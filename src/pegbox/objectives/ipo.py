"""A General Theoretical Paradigm to Understand Learning from Human Preferences (IPO, Azar et al., 2023),
arXiv:2310.12036.

    r(y) = (log p(y | x) - log p_ref(y | x)) / |y|        loss = (r(chosen) - r(rejected) - 1 / (2 beta))^2

beta is the paper's tau.  The paper does not divide by the answer's length |y| in tokens; its experiments do, as its
authors told the authors of TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pegbox.objectives.answers import Answers, count_pairs, halves, reference_log_probs, score
from pegbox.objectives.dpo import count
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions
from pegbox.objectives.preference import Referred, measure, scores, terms


@dataclass(frozen=True, kw_only=True)
class IPO(Referred):
    """What `objective.KEY` sets; beta is how close to 0 the margin is pulled: towards 1 / (2 beta)."""


DEFAULTS = IPO()


def pair_losses(margin: Tensor, settings: IPO) -> Tensor:
    """Losses (P,) of pairs from the difference of their log-ratios a token (P,)."""
    return (margin - 1.0 / (2.0 * settings.beta)).square()


def ipo(
    model: nn.Module,
    batch: Batch,
    *,
    settings: IPO = DEFAULTS,
    reference: nn.Module | None = None,
    num_items: Tensor | float | None = None,
) -> Losses:
    """The loss of a batch of pairs; arguments and errors as of `pegbox.objectives.dpo.dpo`.

    Returns:
        `ipo`, and `aux` where the model has routers.
    """
    before = reference_log_probs(model, batch, reference, "ipo")
    answers, output = score(model, batch)
    losses = pair_losses(_margin(answers, before), settings)
    return terms(model, output, {"ipo": losses}, count_pairs(batch), num_items)


def _margin(answers: Answers, before: Tensor) -> Tensor:
    chosen, rejected = halves(Answers(answers.sums - before, answers.tokens).means)
    return chosen - rejected


@torch.no_grad()
def predict(
    model: nn.Module, batch: Batch, *, settings: IPO = DEFAULTS, reference: nn.Module | None = None
) -> Predictions:
    """Of each pair (P,): its `losses`, and the rewards of its answers, beta times their whole log-ratios."""
    answers, before = score(model, batch)[0], reference_log_probs(model, batch, reference, "ipo")
    chosen, rejected = halves(settings.beta * (answers.sums - before))
    return scores(pair_losses(_margin(answers, before), settings), chosen, rejected)


OBJECTIVE = Objective(
    "ipo", ipo, count, predict, measure, best="reward_accuracy", higher_is_better=True, settings=IPO, refers=True
)
