"""KTO: Model Alignment as Prospect Theoretic Optimization (Ethayarajh et al., 2024), arXiv:2402.01306.

    r(x, y) = log p(y | x) - log p_ref(y | x)        z = max(0, mean of r(x, y') over mismatched answers y')
    loss = w_d (1 - sigmoid(beta (r - z)))        of a desirable answer
           w_u (1 - sigmoid(beta (z - r)))        of an undesirable one

z has no gradient.  A mismatched answer is one to another prompt.  The paper shifts the answers of a batch by one; here
the data layer gives every row one from half the set away, which is another prompt also where rows of one prompt stand
side by side, works in batches of one, and can be asked of the reference before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.settings import setting
from pegbox.objectives.answers import count_answers, reference_log_probs, score
from pegbox.objectives.batch import field
from pegbox.objectives.causal_lm import router_loss
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions
from pegbox.objectives.preference import Referred

MISMATCHED = "mismatched_"


@dataclass(frozen=True, kw_only=True)
class KTO(Referred):
    """What `objective.KEY` sets."""

    desirable_weight: float = setting(1.0, "weight of the desirable answers", at_least=0)
    undesirable_weight: float = setting(1.0, "weight of the undesirable answers", at_least=0)


DEFAULTS = KTO()


def row_losses(ratios: Tensor, desirable: Tensor, baseline: Tensor, settings: KTO) -> Tensor:
    """Losses (A,) of log-ratios (A,), whether each answer is desirable (A,), and z ()."""
    side = torch.where(desirable.bool(), 1.0, -1.0)
    weights = torch.where(desirable.bool(), settings.desirable_weight, settings.undesirable_weight)
    return weights * (1.0 - torch.sigmoid(settings.beta * side * (ratios - baseline)))


def kto(
    model: nn.Module,
    batch: Batch,
    *,
    settings: KTO = DEFAULTS,
    reference: nn.Module | None = None,
    num_items: Tensor | float | None = None,
) -> Losses:
    """The loss of a batch of answers.

    Args:
        model: a tuned model, or any where the reference is given otherwise
        batch: `input_ids`, `attention_mask`, `labels` (A, T), `desirable` (A,) of 0 and 1, the same three of mismatched
            answers as `mismatched_input_ids` ...; `reference_log_probs` and `mismatched_reference_log_probs` (A,) where
            they are known already
        reference: a model to compare with; the tuned model with its adapter off if None
        num_items: what the sum of the losses is divided by; A if None

    Returns:
        `kto`, and `aux` where the model has routers.

    Raises:
        DataError: no `desirable`, or no mismatched answers.
        MethodError: the method trains the base, which is then no reference.  ModelError: there is no adapter.
    """
    desirable = field(batch, "desirable", "kto")
    baseline = _over_processes(_mismatched(model, batch, reference).mean()).clamp(min=0)
    before = reference_log_probs(model, batch, reference, "kto")
    answers, output = score(model, batch)
    total = row_losses(answers.sums - before, desirable, baseline, settings).sum()
    own = count(batch)
    items = own if num_items is None else num_items
    router = router_loss(model, output)
    return {"kto": total / items} | ({} if router is None else {"aux": router * own / items})


@torch.no_grad()
def _mismatched(model: nn.Module, batch: Batch, reference: nn.Module | None) -> Tensor:
    """Log-ratios (A,) of the mismatched answers."""
    mismatched = mismatched_part(batch)
    before = reference_log_probs(model, mismatched, reference, "kto")
    return score(model, mismatched)[0].sums - before


def mismatched_part(batch: Batch) -> Batch:
    """The mismatched answers as a batch of their own."""
    field(batch, f"{MISMATCHED}input_ids", "kto")
    return {key.removeprefix(MISMATCHED): value for key, value in batch.items() if key.startswith(MISMATCHED)}


def _over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def count(batch: Batch, **_: Any) -> Tensor:
    """A, what the mean divides by."""
    return count_answers(batch)


@torch.no_grad()
def predict(
    model: nn.Module, batch: Batch, *, settings: KTO = DEFAULTS, reference: nn.Module | None = None
) -> Predictions:
    """Of each answer (A,): its log-ratio `ratios`, that of its mismatched answer `mismatched`, and `desirable`."""
    before = reference_log_probs(model, batch, reference, "kto")
    ratios = score(model, batch)[0].sums - before
    mismatched = _mismatched(model, batch, reference)
    return {"ratios": ratios.float(), "mismatched": mismatched.float(), "desirable": field(batch, "desirable", "kto")}


def measure(predictions: Predictions, *, settings: KTO = DEFAULTS) -> dict[str, float]:
    """`reward_margin`, the mean reward of desirable answers less that of undesirable ones (nan if either is missing),
    both by themselves, the baseline `kl` over the whole set, and the mean `loss`."""
    ratios, desirable = predictions["ratios"].double(), predictions["desirable"].bool()
    kl = predictions["mismatched"].double().mean().clamp(min=0)
    wanted, unwanted = (settings.beta * ratios[side].mean() for side in (desirable, ~desirable))
    return {
        "reward_margin": (wanted - unwanted).item(),
        "desirable_reward": wanted.item(),
        "undesirable_reward": unwanted.item(),
        "kl": kl.item(),
        "loss": row_losses(ratios, desirable, kl, settings).mean().item(),
    }


OBJECTIVE = Objective(
    "kto", kto, count, predict, measure, best="loss", higher_is_better=False, settings=KTO, refers=True
)
