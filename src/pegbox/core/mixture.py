"""Mixtures: several low-rank experts at a linear layer, of which a router gives each token some.

    y = W x + sum_e w_e(x) B_e A_e x        w: (..., E), zero where an expert is not chosen

Experts stand stacked, A (R, in) and B (out, R), and what a token does not choose is multiplied by zero: one product for
all of them, at any mixture of ranks, and no loop.  The work grows with R, which is small beside the layer's own.

Routes are noted in the context while gradients are made, so that losses over them (`balance`) see all layers at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.graft import Graft
from pegbox.core.method import block_of
from pegbox.core.site import Base

if TYPE_CHECKING:
    from pegbox.core.context import Context


@dataclass(frozen=True)
class Route:
    """Where the tokens of one site went.

    Attributes:
        logits: (..., E) of the router.
        weights: (..., E) of the experts, zero for those that are not chosen.
        mask: (...) bool, tokens that are no padding; None where all are, or where that is unsaid.
        tasks: (B,) or (B, T), which expert was made for a row or a token; None where that is unsaid.
    """

    logits: Tensor
    weights: Tensor
    mask: Tensor | None = None
    tasks: Tensor | None = None

    def tokens(self, values: Tensor) -> Tensor:
        """Rows of (..., n) that are no padding, as (tokens, n)."""
        return values.flatten(0, -2) if self.mask is None else values[self.mask]


def chosen(logits: Tensor, most: int) -> Tensor:
    """Weights (..., E) of a router's logits: softmax over the `most` largest, zero for the others; in float32."""
    logits = logits.float()
    if most >= logits.shape[-1]:
        return logits.softmax(-1)
    values, places = logits.topk(most, dim=-1)
    return torch.zeros_like(logits).scatter(-1, places, values.softmax(-1))


def balance(routes: Sequence[Route]) -> Tensor:
    """E sum_e f_e P_e over the tokens of some sites together: 1 where all experts get the same, more where some do.

    f_e is the share of the choices that fall on e, P_e the mean of its softmax over all experts (Fedus et al., 2021,
    arXiv:2101.03961).
    """
    chose = torch.cat([route.tokens(route.weights.detach() > 0) for route in routes]).float()  # (tokens, E)
    likely = torch.cat([route.tokens(route.logits.float().softmax(-1)) for route in routes])
    shares = chose.sum(0) / chose.sum().clamp_min(1)
    return chose.shape[-1] * (shares * likely.mean(0)).sum()


def known_tasks(routes: Sequence[Route]) -> Tensor | None:
    """Cross-entropy of the routers' choices against the experts that were made for the tokens, the mean over tokens and
    sites; None where no task is said."""
    told = [(route, route.tasks) for route in routes if route.tasks is not None]
    if not told:
        return None
    found = []
    for route, tasks in told:
        shape = route.logits.shape[:-1]
        labels = tasks.to(route.logits.device).view(*tasks.shape, *[1] * (len(shape) - tasks.ndim)).expand(shape)
        wanted = route.tokens(labels[..., None])[:, 0]
        found.append(F.cross_entropy(route.tokens(route.logits).float(), wanted))
    return torch.stack(found).mean()


def router(experts: int, in_features: int) -> nn.Parameter:
    """(E, in), drawn as a linear layer's weight."""
    weight = nn.Parameter(torch.empty(experts, in_features))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


class MixtureGraft(Graft):
    """Adds what the experts make of an input.  A subclass holds them and their router.

    Attributes:
        most: experts of a token.
        spread: (E, R), what one direction of the stack is multiplied by where its expert has weight 1: its scale.
    """

    spread: Tensor
    dropout: float = 0.0

    def __init__(self, most: int, spread: Tensor) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("spread", spread, persistent=False)

    @abstractmethod
    def stacked(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of all experts."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., E)."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        logits = self.logits(x)
        weights = chosen(logits, self.most)
        context = base.site.context
        if torch.is_grad_enabled():
            tasks = context.read("task_ids")
            context.routes[base.site.path] = Route(logits, weights, context.mask_of(logits), tasks)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        return base.low_rank(x, *self.stacked(), 1.0, dropped=dropped, gate=weights @ self.spread)

    def run(self, base: Base, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = self(base, *args, **kwargs)  # masters: the product casts them
        return out


def spread_of(ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """(E, R) of experts with such ranks and scales."""
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    return F.one_hot(owner, len(ranks)).T * torch.tensor(scales)[:, None]


def by_block(context: Context) -> list[list[Route]]:
    """The routes of the last forward, those of one block of the model together."""
    found: dict[str, list[Route]] = {}
    for path, route in context.routes.items():
        found.setdefault(block_of(path, context.anatomy), []).append(route)
    return list(found.values())
