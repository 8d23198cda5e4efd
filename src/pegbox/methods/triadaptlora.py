"""TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning
(Liang et al., 2025), arXiv:2501.08008.

    y = W x + s B C A x        A: (R, in)   C = L + U: (R, R)   B: (out, R)   s = alpha / R

L is block lower and U block upper triangular, so that a layer grows by one border of C: a row of L, a column of U, rows
of A, columns of B.  Diagonal blocks are in both and add up.  Every layer starts with rank `first`; at a growth, the
layers whose |C| / (number of blocks) has grown most since the last one take on `step` ranks more, as many layers as the
time that is over and the ranks that are left say:

    linear: (ranks left) x m        exponential: exp(m log(ranks left))        m: share of the time for growing

    loss + `orthogonal` x the mean over layers of |A A^T - I| and |B^T B - I|

In the code that was found B, C and later blocks start at zero, where nothing but the penalty has a gradient.  Here the
first A, L and U are drawn and B is zero; later A and B are drawn and their border of C is zero, which leaves the update
as it is but for s (`fixed_scale` keeps that too).  There a growth can pass the budget; here it is met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Down, Site, Traits, Tuned, setting
from pegbox.core.growth import WORDS, GrowingGraft, GrowingMethod, block, far_from_orthogonal, growing

if TYPE_CHECKING:
    from pegbox.core.adapter import Adapter, State

STD = 0.02


class TriAdaptLoRAGraft(GrowingGraft):
    """Blocks a_k (s, in), b_k (out, s), rows_k (s, R_k) of L and columns_k (R_k, s) of U.

    Attributes:
        before: |C| / (number of blocks) at the last growth.
    """

    def __init__(self, site: Site, method: TriAdaptLoRA) -> None:
        super().__init__()
        self.out, self.in_ = site.shape
        self.method, self.path, self.dropout = method, site.path, method.dropout
        self.a, self.b, self.rows, self.columns = (nn.ParameterList() for _ in range(4))
        first = self.rank = method.rank_at(site.path)
        self.a.append(block(first, self.in_, std=STD))
        self.b.append(block(self.out, first))
        self.rows.append(block(first, first, std=STD))
        self.columns.append(block(first, first, std=STD))
        self.before = 0.0
        if method.start != "default":
            self.begin(*method.started.factors(site, first, method.factor_at(site.path)))

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor | None = None) -> None:
        """Start from other factors; where B is not zero, C is."""
        self.a[0].copy_(a)
        if b is not None and b.any():
            self.b[0].copy_(b)
            self.rows[0].zero_()
            self.columns[0].zero_()

    def extend(self, size: int) -> None:
        whole = self.rank + size
        self.a.append(block(size, self.in_, std=STD))
        self.b.append(block(self.out, size, std=STD))
        self.rows.append(block(size, whole))
        self.columns.append(block(whole, size))

    @property
    def c(self) -> Tensor:
        """(R, R)."""
        lower = torch.cat([F.pad(row, (0, self.rank - row.shape[1])) for row in self.rows])
        upper = torch.cat([F.pad(col, (0, 0, 0, self.rank - col.shape[0])) for col in self.columns], dim=1)
        return lower + upper

    def factors(self) -> tuple[Down, Tensor, float]:
        scale = self.method.scale_of(self.path, self.rank)
        return self.c @ torch.cat(list(self.a)), torch.cat(list(self.b), dim=1), scale

    def growth(self) -> float:
        """How much |C| / (number of blocks) has grown since the last growth of any layer; notes it."""
        now = self.c.detach().norm().item() / len(self.a)
        grown, self.before = now - self.before, now
        return grown


@dataclass(frozen=True, kw_only=True)
class TriAdaptLoRA(GrowingMethod):
    step: int = setting(4, "ranks that a layer takes on at once", at_least=1)
    pace: Literal["linear", "exponential"] = setting("linear", "how many layers grow as time goes on")
    orthogonal: float = setting(0.5, "weight of the penalty that keeps directions apart", at_least=0)

    traits: ClassVar[Traits] = Traits(seams=("weight", "time"), card="triadaptlora", to_lora=True, grows=True)
    restarts: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, str]] = {
        "reference_rank": "rank",
        "init_rank": "first",
        **WORDS,
        "incre_rank_num": "step",
        "orth_reg_weight": "orthogonal",
    }

    def graft(self, site: Site, shared: nn.Module | None) -> GrowingGraft:
        return self.built(TriAdaptLoRAGraft(site, self), site)

    def size(self, site: Site) -> int | None:
        """At the start."""
        first = self.rank_at(site.path)
        return first * sum(site.shape) + 2 * first**2

    def wanted(self, tuned: Tuned, grafts: Mapping[str, GrowingGraft], left: int, share: float) -> dict[str, int]:
        worth = {path: graft.growth() for path, graft in grafts.items() if isinstance(graft, TriAdaptLoRAGraft)}
        many = left * share if self.pace == "linear" else math.exp(share * math.log(left))
        best = sorted(worth, key=lambda path: -worth[path])
        return dict.fromkeys(best[: max(1, int(many))], self.step)

    def penalty(self, tuned: Tuned) -> Tensor | None:
        grafts = [g for name in tuned.active for g in growing(tuned, name).values() if isinstance(g, TriAdaptLoRAGraft)]
        if not self.orthogonal or not grafts:
            return None
        far = [
            far_from_orthogonal(p[None]) for g in grafts for p in (torch.cat(list(g.a)), torch.cat(list(g.b), dim=1).T)
        ]
        return self.orthogonal * torch.cat(far).mean()

    def training_state(self, adapter: Adapter) -> State:
        kept = {key: graft for key, graft in adapter.grafts.items() if isinstance(graft, TriAdaptLoRAGraft)}
        return {key: torch.tensor(graft.before, dtype=torch.float64) for key, graft in kept.items()}

    def load_training_state(self, adapter: Adapter, state: State) -> None:
        for key, value in state.items():
            graft = adapter.grafts[key]
            assert isinstance(graft, TriAdaptLoRAGraft)
            graft.before = value.item()
