"""Reward modelling: a number for an answer, higher for the one that people chose.

    loss = -log sigmoid(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2

the Bradley-Terry model, with the margin m of a pair where its row gives one (Llama 2, Touvron et al., 2023,
arXiv:2307.09288) and rewards drawn towards 0 by c (Eisenstein et al., 2023, arXiv:2312.09244), 0 by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import DataError
from pegbox.core.headless import logits_of
from pegbox.core.settings import setting
from pegbox.objectives.answers import count_pairs, halves
from pegbox.objectives.batch import model_inputs
from pegbox.objectives.dpo import count
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions, Settings
from pegbox.objectives.preference import measure, scores


@dataclass(frozen=True, kw_only=True)
class Reward(Settings):
    """What `objective.KEY` sets."""

    centre: float = setting(0.0, "c: how strongly rewards are drawn towards 0; 0.01 is usual", at_least=0)


DEFAULTS = Reward()


def reward(
    model: nn.Module, batch: Batch, *, settings: Reward = DEFAULTS, num_items: Tensor | float | None = None
) -> Losses:
    """The loss of a batch of pairs.

    Args:
        model: a sequence classifier with one output, logits (2P, 1), as it is or wrapped
        batch: padded pairs, see `pegbox.objectives.answers`; `margin` (P,) where rows have one
        num_items: what the sum of the losses is divided by; P if None

    Returns:
        `reward`, and `centre` where c is not 0.

    Raises:
        DataError: packed pairs, or a model with more than one output.
    """
    rewards = _rewards(model, batch)
    items = count_pairs(batch) if num_items is None else num_items
    chosen, rejected = halves(rewards)
    losses = {"reward": pair_losses(chosen, rejected, batch.get("margin")).sum() / items}
    if settings.centre:
        losses["centre"] = settings.centre * (chosen + rejected).square().sum() / items
    return losses


def pair_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    """Losses (P,) of rewards (P,), and margins (P,) where there are any."""
    return -F.logsigmoid(chosen - rejected if margin is None else chosen - rejected - margin)


def _rewards(model: nn.Module, batch: Batch) -> Tensor:
    """(2P,)"""
    if "segments" in batch:
        raise DataError("a reward is read off the end of a row, and a packed row holds several answers")
    logits = logits_of(model(**model_inputs(model, batch))).float()
    if logits.shape != (len(batch["input_ids"]), 1):
        raise DataError(f"a reward is one number a row, this model gives {tuple(logits.shape)}; load it with 1 label")
    return logits.squeeze(1)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, settings: Reward = DEFAULTS) -> Predictions:
    """Of each pair (P,): its `losses`, without the term that centres, and the rewards `chosen` and `rejected`."""
    chosen, rejected = halves(_rewards(model, batch))
    return scores(pair_losses(chosen, rejected, batch.get("margin")), chosen, rejected)


OBJECTIVE = Objective(
    "reward", reward, count, predict, measure, best="reward_accuracy", higher_is_better=True, settings=Reward
)
