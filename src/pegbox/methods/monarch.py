"""Monarch: Expressive Structured Matrices for Efficient and Accurate Training (Dao et al., 2022), arXiv:2204.00595.

    W' = M(L, R)        R: (k, q, p), blocks of the inputs   L: (l, s, t), blocks of the outputs   k = l = `blocks`

A matrix gives way to the product of two block-diagonal ones with a fixed permutation between them, of
`rank` x `blocks` x (in + out) numbers.  From dense to sparse, they start as the nearest to W (`start=project`, exact in
the Frobenius norm, see core/monarch.py) and are tuned; that is compression, and the model does not start as the base.
Drawn (`start=random`) they train from scratch, each block uniform within 1 / sqrt(its inputs).  Reverse sparsification,
from sparse to dense: after `dense_after` of the steps each product is multiplied out, and the dense matrix trains on,
by the same schedule (the paper gives no split; 0.8 to 0.9 is usual).

The base keeps W; merging puts M in its place, dense.  The authors' projection is of square matrices and rank 1; here
any shape is padded, and `rank` terms of each slice are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Base, Method, Site, Traits, Tuned, WeightGraft, by_settings, setting
from pegbox.core.growth import newborn
from pegbox.core.monarch import dense, multiply, project


class MonarchGraft(WeightGraft):
    """R and L, or the dense matrix (out, in) that they were multiplied out to."""

    def __init__(self, site: Site, method: Monarch) -> None:
        super().__init__()
        self.out, self.in_ = site.shape
        right, left = method.factors(site)
        self.right, self.left = nn.Parameter(right), nn.Parameter(left)
        self.whole: nn.Parameter | None = None
        self.since: int | None = None
        if method.dense_since is not None:
            self.multiply_out(method.dense_since)

    def multiply_out(self, step: int) -> None:
        """The product takes the factors' place; it trains from a step on."""
        self.whole = nn.Parameter(dense(self.right.detach(), self.left.detach(), self.out, self.in_).contiguous())
        del self.right, self.left
        self.since = step

    def born(self) -> dict[str, int]:
        return {} if self.since is None else {"whole": self.since}

    def weight(self, w: Tensor) -> Tensor:
        made = dense(self.right, self.left, self.out, self.in_) if self.whole is None else self.whole
        return made.view(w.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.whole is not None or not base.site.is_linear:
            return super().forward(base, x)
        y = multiply(x, self.right, self.left, self.out)
        return y + base.read("bias").to(y.dtype) if base.site.has("bias") else y


BENEATH = "it takes the matrix's place, so that an adapter beneath it has no say"
USUAL = Traits(
    seams=("weight", "time"), card="monarch", identity=False, exact_base=True, xfail={"a_stack_runs_all": BENEATH}
)


@dataclass(frozen=True, kw_only=True)
class Monarch(Method):
    blocks: int = setting(4, "blocks of inputs, and of outputs", at_least=1)
    rank: int = setting(1, "of the slice that a block of inputs and one of outputs share", at_least=1)
    start: Literal["project", "random"] = setting("project", "where the factors start")
    dense_after: float = setting(1.0, "share of the steps after which dense matrices train on", above=0, at_most=1)
    dense_since: int | None = setting(None, "the step at which they did; found while training")

    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: replace(USUAL, grows=method.dense_after < 1))
    found: ClassVar[tuple[str, ...]] = ("dense_since",)
    restarts: ClassVar[bool] = False

    def graft(self, site: Site, shared: nn.Module | None) -> MonarchGraft:
        return MonarchGraft(site, self)

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """R (k, q, p) and L (l, s, t) at the start."""
        if self.start == "project":
            return project(site.read("weight").detach().flatten(1), self.blocks, self.blocks, self.rank)
        out, in_ = site.shape
        p, s, q = math.ceil(in_ / self.blocks), math.ceil(out / self.blocks), self.rank * self.blocks
        drawn = torch.rand(self.blocks, q, p) * 2 - 1, torch.rand(self.blocks, s, q) * 2 - 1
        return drawn[0] / math.sqrt(p), drawn[1] / math.sqrt(q)

    def size(self, site: Site) -> int | None:
        out, in_ = site.shape
        if self.dense_since is not None:
            return out * in_
        n = self.blocks
        return self.rank * n * n * (math.ceil(in_ / n) + math.ceil(out / n))

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        if self.dense_since is not None or not self.dense_after < 1 or step < self.dense_after * steps:
            return
        for name in [name for name in tuned.active if tuned.adapter(name).method is self]:
            adapter: Any = tuned.adapter(name)
            for graft in adapter.grafts.values():
                graft.multiply_out(step)
            newborn(tuned, name, replace(self, dense_since=step))
