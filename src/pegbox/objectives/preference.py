"""What the preference objectives share: settings, terms, and how often and how far the chosen answer is preferred.

Answers come in pairs (see `pegbox.objectives.answers`): the chosen and the rejected, P of each.  A reward is what an
objective makes of an answer's log-probability; it prefers the answer with the higher reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.settings import setting
from pegbox.objectives.causal_lm import router_loss
from pegbox.objectives.objective import Losses, Predictions, Settings


@dataclass(frozen=True, kw_only=True)
class Referred(Settings):
    """Settings of an objective that compares with the model before training."""

    beta: float = setting(0.1, "how strongly the model is held to the reference", above=0)
    precompute: bool = setting(False, "ask the reference once, before training; a method that trains the base needs it")


def uncertain(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid, where a share of the pairs may be the wrong way round: (P,) -> (P,).

    -(1 - s) log sigmoid(z) - s log sigmoid(-z)
    """
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def terms(
    model: nn.Module, output: Any, named: Mapping[str, Tensor], count: Tensor, num_items: Tensor | float | None
) -> Losses:
    """Losses of P pairs each, (P,), as means, or as shares of `num_items`; with the routers' balance loss."""
    items = count if num_items is None else num_items
    losses = {name: values.sum() / items for name, values in named.items()}
    router = router_loss(model, output)
    return losses if router is None else losses | {"aux": router * count / items}


def scores(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Predictions:
    """What an evaluation keeps of P pairs: `losses`, and the rewards `chosen` and `rejected`, (P,) each."""
    return {"losses": losses.float(), "chosen": chosen.float(), "rejected": rejected.float()}


def measure(predictions: Predictions, *, settings: Settings | None = None) -> dict[str, float]:
    """`reward_accuracy`, the share of pairs whose chosen answer has the higher reward; `reward_margin`, by how much on
    average; `chosen_reward` and `rejected_reward`; and the mean `loss`."""
    chosen, rejected = predictions["chosen"].double(), predictions["rejected"].double()
    return {
        "reward_accuracy": (chosen > rejected).double().mean().item(),
        "reward_margin": (chosen - rejected).mean().item(),
        "chosen_reward": chosen.mean().item(),
        "rejected_reward": rejected.mean().item(),
        "loss": predictions["losses"].double().mean().item(),
    }


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near both ends.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    near = x > -0.6931471805599453  # log 2
    # the branch not taken gets a harmless value, so that its derivative is finite
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)
