"""MoLA: Higher Layers Need More LoRA Experts (Gao et al., 2024), arXiv:2402.08562.

    y = W x + s sum_e w_e B_e A_e x        A_e: (r, in)   B_e: (out, r), zero at the start   s = alpha / r

    w = softmax of the `top_k` largest of R x, zero for the others        R: (E, in), the router of this layer

Every linear layer has experts and a router of its own, and how many experts is said for each block of the model
(`experts=[2,4,6,8]` for a model of four).  In a block, `balance` times

    E sum_e f_e P_e        f_e: share of the choices that are e   P_e: mean probability of e over all of R x

over the tokens of all its layers is added to the loss: 1 where the experts are used alike, more where they are not.

The paper concludes that higher layers need more experts, its final version that middle ones do; the counts are free.
In the authors' code the balance counts padding, here it does not, except at the end of packed rows and where an encoder
and a decoder see tokens of their own; dropout is drawn once for all experts.  Experts have no start of their own:
`start=eva` gives all of a layer the same one, and the routers part them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Site, Traits, Tuned, by_settings, setting
from pegbox.core.errors import SettingsError
from pegbox.core.low_rank_start import LowRankMethod, StartedFactors
from pegbox.core.method import block_of
from pegbox.core.mixture import MixtureGraft, balance, by_block, router, spread_of


class Expert(StartedFactors):
    def __init__(self, site: Site, method: MoLA) -> None:
        super().__init__()
        self.start(site, method)


class MoLAGraft(MixtureGraft):
    def __init__(self, site: Site, method: MoLA, experts: int) -> None:
        made = [Expert(site, method) for _ in range(experts)]
        width = len(made[0].difference()[0])
        super().__init__(method.top_k, spread_of([width] * experts, [method.factor_at(site.path)] * experts))
        self.experts = nn.ModuleList(made)
        self.router = router(experts, site.shape[1]) if experts > 1 else None
        self.dropout = method.dropout

    def stacked(self) -> tuple[Tensor, Tensor]:
        downs, ups = zip(*(expert.difference() for expert in self.experts), strict=True)  # type: ignore[operator]
        return torch.cat(downs), torch.cat(ups, dim=1)

    def logits(self, x: Tensor) -> Tensor:
        if self.router is None:
            return x.new_zeros(*x.shape[:-1], 1)
        return F.linear(x, self.router.to(x.dtype))

    def begin(self, a: Tensor, b: Tensor | None = None) -> None:
        """Start every expert from these factors."""
        for expert in self.experts:
            expert.begin(a, b)  # type: ignore[operator]


SOFT = Traits(seams=("output", "mixture"), card="mola", merge="no")
ROUTED = replace(SOFT, routed=True)


@dataclass(frozen=True, kw_only=True)
class MoLA(LowRankMethod):
    rank: int = setting(8, "rank of an expert: rows of A, columns of B", at_least=1)
    alpha: float = setting(16.0, "an expert is scaled by alpha / rank", above=0)
    experts: int | tuple[int, ...] = setting(5, "experts of a layer, or of those of each block in turn", at_least=1)
    top_k: int = setting(2, "experts that a token is given to", at_least=1)
    balance: float = setting(0.001, "weight of the loss that keeps the experts in use", at_least=0)

    traits: ClassVar[Traits] = by_settings(ROUTED, lambda method: ROUTED if method.chooses else SOFT)

    @property
    def chooses(self) -> bool:
        """Whether some layer has more experts than a token is given to."""
        return max((self.experts,) if isinstance(self.experts, int) else self.experts) > self.top_k

    def graft(self, site: Site, shared: nn.Module | None) -> MoLAGraft | None:
        experts = self.experts_at(site)
        return MoLAGraft(site, self, experts) if experts and self.rank_at(site.path) else None

    def experts_at(self, site: Site) -> int:
        """E of a site; none outside the blocks, where these are listed.

        Raises:
            SettingsError: `experts` lists more or fewer blocks than the model has.
        """
        if isinstance(self.experts, int):
            return self.experts
        anatomy = site.context.anatomy
        blocks = anatomy.blocks
        if len(self.experts) != len(blocks):
            raise SettingsError(
                f"mola.experts lists {len(self.experts)} blocks, and this model has {len(blocks)}; expected one number "
                "for each block, or one for all"
            )
        return dict(zip(blocks, self.experts, strict=True)).get(block_of(site.path, anatomy), 0)

    def size(self, site: Site) -> int | None:
        experts, (out, in_) = self.experts_at(site), site.shape
        return experts * self.rank_at(site.path) * (out + in_) + (experts * in_ if experts > 1 else 0)

    def penalty(self, tuned: Tuned) -> Tensor | None:
        mixed = [routes for routes in by_block(tuned.context) if routes[0].logits.shape[-1] > 1]
        if not self.balance or not mixed:
            return None
        return self.balance * torch.stack([balance(routes) for routes in mixed]).sum()
