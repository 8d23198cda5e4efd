"""IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (Zhang et al., 2023),
arXiv:2308.12043.

    y = W x + s B (E A) x        A: (R, in)   E: (R,)   B: (out, R)   s = alpha / R, R the rank that counts now

Every layer starts with rank `first`.  From time to time the `top` layers that matter most take on `step` ranks more,
until there are `rank` ranks a layer in the mean.  Rows of A and columns of B of the ranks that come next are there
before, behind an E of 1e-5 that rests, and learn their directions (`reserve`).

What matters: with g the gradient of the whole update, the sum of |update g| over the layer, averaged over steps by
`beta`, times the average of how far it is from its average.  g is made where the layer runs, for as many steps before
a growth as weigh in that average (all but 0.5 % of it), and kept nowhere.  With gradient accumulation the batches of a
step add up.

    loss + `orthogonal` x the mean over blocks of |A_k A_k^T - I| and |B_k^T B_k - I|

New ranks are a group of the optimizer with its own learning rate, which goes through the run's whole schedule in the
steps that are left.  In the authors' code a growth shrinks the update by R / (R + step), as s does; `fixed_scale` keeps
it.  There the budget can be passed by ties and remainders; here it is met exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Down, Site, Traits, Tuned, setting
from pegbox.core.growth import WORDS, GrowingGraft, GrowingMethod, block, far_from_orthogonal, growing
from pegbox.core.scores import Scored

if TYPE_CHECKING:
    from pegbox.core.adapter import Adapter, State

STD = 0.02  # of new rows and columns
RESTING = 1e-5  # E of the reserve
FORGOTTEN = 0.005  # weight in the average that scores are not made for


class IncreLoRAGraft(Scored, GrowingGraft):
    """Blocks a_k (s, in), b_k (out, s), e_k (n, 1): n of its ranks count.  The last block is the reserve, without e."""

    def __init__(self, site: Site, method: IncreLoRA) -> None:
        super().__init__()
        self.out, self.in_ = site.shape
        self.method, self.path, self.dropout = method, site.path, method.dropout
        self.a, self.e, self.b = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.rank = method.rank_at(site.path)
        self._open(self.rank)
        self.e.append(block(self.rank, 1))
        if method.start != "default":
            self.begin(*method.started.factors(site, self.rank, method.factor_at(site.path)))
        if method.reserve:
            self._open(method.step)

    def _open(self, size: int) -> None:
        self.a.append(block(size, self.in_, std=STD))
        self.b.append(block(self.out, size, std=STD))

    def extend(self, size: int) -> None:
        if not self.method.reserve:
            self._open(size)
        self.e.append(nn.Parameter(torch.full((size, 1), RESTING if self.method.reserve else 0.0)))
        if self.method.reserve:
            self._open(self.method.step)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor | None = None) -> None:
        """Start from other factors; behind an E of zero they change nothing yet."""
        self.a[0].copy_(a)
        if b is not None and b.any():
            self.b[0].copy_(b)

    def factors(self) -> tuple[Down, Tensor, float]:
        counted = list(zip(self.e, self.a, self.b, strict=False))
        downs, ups = [e * a[: len(e)] for e, a, _ in counted], [b[:, : len(e)] for e, _, b in counted]
        if len(self.a) > len(self.e) and not self.complete:
            downs.append(RESTING * self.a[-1])
            ups.append(self.b[-1])
        return torch.cat(downs), torch.cat(ups, dim=1), self.method.scale_of(self.path, self.rank)


@dataclass(frozen=True, kw_only=True)
class IncreLoRA(GrowingMethod):
    step: int = setting(4, "ranks that a layer takes on at once", at_least=1)
    top: int = setting(3, "layers that grow at a time", at_least=1)
    reserve: bool = setting(True, "directions of the next ranks learn before these count")
    orthogonal: float = setting(0.1, "weight of the penalty that keeps each block's directions apart", at_least=0)
    beta: float = setting(0.85, "how much of the averages of scores is kept from step to step", at_least=0, below=1)

    traits: ClassVar[Traits] = Traits(seams=("weight", "time"), card="increlora", to_lora=True, grows=True)
    aliases: ClassVar[Mapping[str, str]] = {**WORDS, "incre_rank_num": "step", "target_rank": "rank", "top_h": "top"}

    def graft(self, site: Site, shared: nn.Module | None) -> GrowingGraft:
        return self.built(IncreLoRAGraft(site, self), site)

    def size(self, site: Site) -> int | None:
        """At the start."""
        first = self.rank_at(site.path)
        return (first + (self.step if self.reserve else 0)) * sum(site.shape) + first

    def wanted(self, tuned: Tuned, grafts: Mapping[str, GrowingGraft], left: int, share: float) -> dict[str, int]:
        worth = {path: graft.mean * graft.spread for path, graft in grafts.items() if isinstance(graft, IncreLoRAGraft)}
        best = sorted(worth, key=lambda path: -worth[path])
        return dict.fromkeys(best[: self.top], self.step)

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        super().before_step(tuned, step, steps)
        for graft in _grafts(tuned):
            graft.watches = not graft.complete and self._weighs(step)

    def _weighs(self, step: int) -> bool:
        """Whether a step's score matters to the next growth."""
        growth = (max(step, self.wait) // self.every + 1) * self.every
        return self.beta ** (growth - step - 1) > FORGOTTEN

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        for graft in _grafts(tuned):
            if graft.watches:
                graft.average(self.beta)

    def penalty(self, tuned: Tuned) -> Tensor | None:
        blocks: dict[tuple[int, int], list[Tensor]] = {}
        for graft in _grafts(tuned):
            for p in (*graft.a, *(b.T for b in graft.b)):
                blocks.setdefault((p.shape[0], p.shape[1]), []).append(p)
        if not self.orthogonal or not blocks:
            return None
        far = [far_from_orthogonal(torch.stack(alike)) for alike in blocks.values()]
        return self.orthogonal * torch.cat(far).mean()

    def training_state(self, adapter: Adapter) -> State:
        kept = {key: graft for key, graft in adapter.grafts.items() if isinstance(graft, IncreLoRAGraft)}
        return {key: torch.tensor([graft.mean, graft.spread], dtype=torch.float64) for key, graft in kept.items()}

    def load_training_state(self, adapter: Adapter, state: State) -> None:
        for key, values in state.items():
            graft = adapter.grafts[key]
            assert isinstance(graft, IncreLoRAGraft)
            graft.mean, graft.spread = values.tolist()


def _grafts(tuned: Tuned) -> list[IncreLoRAGraft]:
    every = [graft for name in tuned.active for graft in growing(tuned, name).values()]
    return [graft for graft in every if isinstance(graft, IncreLoRAGraft)]
