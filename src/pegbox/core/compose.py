"""Several adapters at once: a stack, a weighted sum.  (One per row of a batch is in rows.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pegbox.core.errors import CannotMix, SettingsError
from pegbox.core.graft import Graft, LowRankGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.site import Base


class Stack:
    """Adapters one around the other, the first innermost: each sees the model as those before it leave it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.names))})"


class Sum:
    """The base plus the weighted sum of what each adapter alone would change: `Sum(a=0.5, b=0.5)`."""

    def __init__(self, **weights: float) -> None:
        self.weights = weights

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def __repr__(self) -> str:
        return f"Sum({', '.join(f'{k}={v}' for k, v in self.weights.items())})"


Plan = Stack | Sum


def as_plan(use: str | Stack | Sum | Sequence[str]) -> Plan:
    """A name is a stack of one; a list of names is a stack.

    Raises:
        SettingsError: it names no adapter, or a weight is no number.
    """
    plan = use if isinstance(use, (Stack, Sum)) else Stack(use) if isinstance(use, str) else Stack(*use)
    if not plan.names:
        raise SettingsError(f"{plan} names no adapter; `with tuned.disabled():` is the base")
    for name, weight in plan.weights.items() if isinstance(plan, Sum) else ():
        if not isinstance(weight, (int, float)):
            raise SettingsError(f"the weight of {name} in a Sum must be a number, got {weight!r}")
    return plan


def chain(plan: Plan, grafts: dict[str, Graft]) -> tuple[Graft, ...]:
    """The grafts of one site that a plan puts to use, innermost first."""
    here = [(name, grafts[name]) for name in plan.names if name in grafts]
    if isinstance(plan, Stack) or not here:
        return tuple(graft for _, graft in here)
    ready = [graft for _, graft in here if graft.prepares]
    summed = {name: graft for name, graft in here if not graft.prepares}
    total = [sum_of([plan.weights[name] for name in summed], list(summed.values()))] if summed else []
    return (*ready, *total)


def sum_of(weights: Sequence[float], grafts: Sequence[Graft]) -> Graft:
    """One graft that adds the weighted changes of several at a site."""
    if len({bool(g.maps) for g in grafts}) > 1:
        kinds = ", ".join(sorted({type(g).__name__ for g in grafts}))
        raise CannotMix(f"{kinds} change different things at one site, so they have no sum; use Stack instead")
    if not all(g.sums for g in grafts):
        kinds = ", ".join(sorted({type(g).__name__ for g in grafts if not g.sums}))
        raise CannotMix(f"what {kinds} puts before the input has no sum; use Stack instead")
    low_rank = [g for g in grafts if isinstance(g, LowRankGraft)]
    if len(low_rank) == len(grafts):
        return LowRankSum(weights, low_rank)
    return (WeightSum if grafts[0].maps else OutputSum)(weights, grafts)


class _Members(Graft):
    """Holds the summed grafts without owning them: they belong to their adapters."""

    def __init__(self, weights: Sequence[float], grafts: Sequence[Graft]) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.members = tuple(grafts)  # a tuple, so that no parameter is registered twice
        self.maps = tuple(dict.fromkeys(parameter for graft in grafts for parameter in graft.maps))


class WeightSum(_Members):
    """W + sum_i w_i (g_i(W) - W), for each parameter over the members that map it."""

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        pairs = zip(self.weights, self.members, strict=True)
        return w + sum(weight * (graft.mapped(parameter, w) - w) for weight, graft in pairs if parameter in graft.maps)

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.through(self)(*args, **kwargs)


class OutputSum(_Members):
    """y + sum_i w_i (g_i(x, y) - y), for grafts whose outputs are single tensors of one shape."""

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        y = base(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise CannotMix(f"outputs of {base.site.path or 'the model'} are not one tensor, so they have no sum")
        total = y
        for weight, graft in zip(self.weights, self.members, strict=True):
            total = total + weight * (graft.run(base, *args, **kwargs) - y)
        return total


class LowRankSum(_Members):
    """Factors side by side: one product of the total rank.  Dropout of the members is left out."""

    any_layout = True

    def factors(self, width: int) -> tuple[Tensor, Tensor, float]:
        """down (R, in), up (out, R) with R the sum of the ranks, and a scale of 1."""
        downs, ups = [], []
        for weight, graft in zip(self.weights, self.members, strict=True):
            assert isinstance(graft, LowRankGraft)
            down, up, scale = graft.factors()
            downs.append(as_matrix(down, width, up))
            ups.append(weight * scale * up)
        return torch.cat(downs), torch.cat(ups, dim=1), 1.0

    def weight(self, w: Tensor) -> Tensor:
        down, up, _ = self.factors(w.shape[1])
        return w + up @ down

    def run(self, base: Base, x: Tensor) -> Tensor:
        return base.low_rank(x, *self.factors(base.site.shape[1]))
