"""Ranks that grow while a method trains, up to a budget, and never past it.

A growing graft keeps its factors in blocks; growing appends one.  What has grown, when and by how much, is a setting of
the method (`grown`), so that an adapter's file, and a checkpoint, builds the same blocks again.  `born` says at which
step each of a graft's parameters began to train: `tuned.groups` keeps those of one step in a group of their own, which
is what an optimizer is given when they are born (`pegbox.train.growth`), and what it finds again when a run is resumed.

Draws come from the global generator, which a checkpoint restores.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import starts
from pegbox.core.errors import SettingsError
from pegbox.core.graft import LowRankGraft, check_rank
from pegbox.core.low_rank_start import LowRankMethod, value_at
from pegbox.core.method import Method
from pegbox.core.settings import setting
from pegbox.core.site import Site
from pegbox.core.starts import Start

if TYPE_CHECKING:
    from pegbox.core.tuned import Tuned

WORDS = {"init_warmup": "wait", "incre_interval": "every"}  # of the authors' codes
Event = tuple[int, int]  # step, and by how many ranks


class GrowingGraft(LowRankGraft):
    """Low-rank factors in blocks.

    Attributes:
        rank: that counts now.
        complete: the budget is full, so that it grows no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.complete = 0, False
        self._born: dict[str, int] = {}

    @abstractmethod
    def extend(self, size: int) -> None:
        """Take on so many ranks more."""

    def grow(self, size: int, step: int) -> None:
        """Take on so many ranks more at an optimizer step; what trains from then on, is born then."""
        before = self._trains()
        self.extend(size)
        self.rank += size
        self._born |= dict.fromkeys(self._trains() - before, step)

    def _trains(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def born(self) -> dict[str, int]:
        return self._born


@dataclass(frozen=True, kw_only=True)
class GrowingMethod(LowRankMethod):
    """Budget and times of growth; a subclass says what grows next."""

    rank: int = setting(8, "mean rank of the layers in the end: the budget is that, times their number", at_least=1)
    alpha: float = setting(16.0, "the update is scaled by alpha / rank", above=0)
    ranks: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "other ranks at the start, by the end of a path or a regex over it"}
    )
    first: int = setting(1, "rank of every layer at the start", at_least=1)
    wait: int = setting(100, "steps before the first growth", at_least=0)
    every: int = setting(100, "steps from one growth to the next", at_least=1)
    fixed_scale: bool = setting(
        False, "scale by alpha / (mean rank in the end) throughout, so that growing changes nothing"
    )
    grown: Mapping[str, tuple[Event, ...]] = field(
        default_factory=dict, metadata={"help": "what has grown: step and ranks, by path; found while training"}
    )

    complete: bool = setting(False, "whether the budget is full; found while training")

    found: ClassVar[tuple[str, ...]] = (*LowRankMethod.found, "grown", "complete")

    def rank_at(self, path: str) -> int:
        """At the start."""
        return int(value_at(self.ranks, path, self.first))

    def factor_at(self, path: str) -> float:
        """s at the start."""
        return self.scale_of(path, self.rank_at(path))

    def scale_of(self, path: str, rank: int) -> float:
        """s of a site of some rank."""
        counted = self.rank if self.fixed_scale else rank
        return value_at(self.alphas, path, self.alpha) / (math.sqrt(counted) if self.rslora else counted)

    @property
    def started(self) -> Start:
        """The start; one that gives ranks to layers by what it finds leaves that to growth."""
        kept = {"rho": 1.0} if self.start == "eva" else {}
        return starts.get(self.start, {**kept, **self.start_settings})

    @property
    def apart(self) -> bool:
        return False  # what stands between A and B is zero at the start

    def built(self, graft: GrowingGraft, site: Site) -> GrowingGraft:
        """A graft with its first block, grown as far as is known.

        Raises:
            SettingsError: it starts above its budget, or grows above what its matrix can have.
        """
        if self.first > self.rank:
            raise SettingsError(
                f"{self.name()}.first is {self.first}, the rank of every layer at the start, and above "
                f"{self.name()}.rank={self.rank}, their mean in the end"
            )
        for step, size in self.grown.get(site.path, ()):
            graft.grow(size, step)
        check_rank(site, graft.rank)
        graft.complete = self.complete
        return graft

    @abstractmethod
    def wanted(self, tuned: Tuned, grafts: Mapping[str, GrowingGraft], left: int, share: float) -> dict[str, int]:
        """How many ranks layers are to get now, by path, the most important first.

        Args:
            left: ranks until the budget is full.
            share: of the time for growing that is over.
        """

    def grows_at(self, step: int) -> bool:
        """Whether there is growth before an optimizer step."""
        return step > self.wait and step % self.every == 0

    def left(self, grafts: Mapping[str, GrowingGraft]) -> int:
        """Ranks until the budget is full."""
        return max(0, self.rank * len(grafts) - sum(graft.rank for graft in grafts.values()))

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        for name in [name for name in tuned.active if tuned.adapter(name).method is self]:
            grafts = growing(tuned, name)
            left = self.left(grafts)
            if self.complete or not self.grows_at(step):
                continue
            sizes: dict[str, int] = {}
            share = (step - self.wait) / max(1, steps - self.wait)
            for path, size in self.wanted(tuned, grafts, left, share).items():
                most = min(tuned.sites[path].shape) - grafts[path].rank
                if taken := min(size, left, most):
                    sizes[path], left = taken, left - taken
            grow(tuned, name, sizes, step)


def growing(tuned: Tuned, name: str) -> dict[str, GrowingGraft]:
    """The growing grafts of an adapter, by path."""
    here = {path: site.grafts[name] for path, site in tuned.sites.items() if name in site.grafts}
    return {path: graft for path, graft in here.items() if isinstance(graft, GrowingGraft)}


def grow(tuned: Tuned, name: str, sizes: Mapping[str, int], step: int) -> None:
    """Let layers of an adapter take on ranks, by path, at an optimizer step."""
    if not sizes:
        return
    grafts, adapter = growing(tuned, name), tuned.adapter(name)
    for path, size in sizes.items():
        graft = grafts[path]
        graft.grow(size, step)
        graft.to(tuned.sites[path].device)
    method: Any = adapter.method
    events = {path: (*method.grown.get(path, ()), (step, size)) for path, size in sizes.items()}
    full = method.left(grafts) <= 0
    for graft in grafts.values():
        graft.complete = full
    newborn(tuned, name, replace(method, grown={**method.grown, **events}, complete=full))


def newborn(tuned: Tuned, name: str, method: Method) -> None:
    """An adapter has other tensors than before, and a method whose settings say so."""
    adapter = tuned.adapter(name)
    adapter.method = method
    adapter.trained = frozenset(key for key, p in adapter.own().items() if p.requires_grad)


def far_from_orthogonal(p: Tensor) -> Tensor:
    """(n,) |p p^T - I| of matrices (n, s, d)."""
    return (p @ p.mT - torch.eye(p.shape[1], device=p.device)).flatten(1).norm(dim=1)


def block(*shape: int, std: float = 0.0) -> nn.Parameter:
    """A parameter of zeros, or drawn normally."""
    return nn.Parameter(torch.randn(shape) * std if std else torch.zeros(shape))
