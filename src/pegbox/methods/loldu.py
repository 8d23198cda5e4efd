"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition (Shi et al., 2024), arXiv:2410.13618.

    W = P L diag(d) U        P: a permutation   L: (out, k) and U: (k, in) unit triangular   d: (k,)   k = min(out, in)

    W' = W + s P L_r diag(z - d_r) U_r        z: (r,), all that trains, z = d_r at the start   s = alpha / r

L_r is the first r columns of L, U_r the first r rows of U.  r numbers a layer are trained and saved; the factors are
taken from W again where the adapter is loaded.  They need r (out + in) numbers of memory.

The authors put W - s P L_r diag(d_r) U_r in the place of W, and P as a dense matrix beside it; here W stays and P
permutes rows.  Elimination runs in float64 on W rounded to bfloat16, so that one checkpoint gives one factorisation
whatever dtype it is loaded in; the change of the weight is exact for any factors.  A zero pivot's row of U is zero.
With another `start` than `lu`, z starts at ones, zeros, the mean of d_r, or draws with its mean and deviation, and the
model does not start as the base, as in the paper's ablation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Down, LowRankGraft, Method, Site, Traits, by_settings, setting
from pegbox.core.graft import check_rank


class LoLDUGraft(LowRankGraft):
    lower: Tensor
    upper: Tensor
    d: Tensor

    def __init__(self, site: Site, method: LoLDU) -> None:
        super().__init__()
        check_rank(site, method.rank)
        lower, d, upper = factorised(site.read("weight"), method.rank)
        self.scale, self.dropout = method.alpha / method.rank, method.dropout
        for name, value in (("lower", lower), ("d", d), ("upper", upper)):
            self.register_buffer(name, value, persistent=False)  # the base has it
        self.z = nn.Parameter(started(d, method.start))

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.upper, self.lower * (self.z - self.d), self.scale


@torch.no_grad()
def factorised(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P L (out, r), d (r,) and U (r, in) of a matrix (out, in), in float32."""
    p, lower, upper = torch.linalg.lu(w.detach().bfloat16().double())
    d = upper.diagonal()[:rank]
    safe = torch.where(d == 0, torch.inf, d)
    rows = p.argmax(1)  # row i of P L is row rows[i] of L
    return lower[:, :rank][rows].float(), d.float(), (upper[:rank] / safe[:, None]).float()


def started(d: Tensor, start: str) -> Tensor:
    """z, from the diagonal (r,)."""
    if start == "lu":
        return d.clone()
    mean, deviation = d.mean(), d.std(correction=0)
    if start == "normal":
        return mean + deviation * torch.randn_like(d)
    if start == "uniform":
        return mean + deviation * 3**0.5 * (2 * torch.rand_like(d) - 1)
    return torch.full_like(d, {"mean": mean.item(), "ones": 1.0, "zeros": 0.0}[start])


STACKED = "its factors are those of the base beneath it, which differs where another adapter has been merged"
USUAL = Traits(
    seams=("weight",),
    card="loldu",
    linear=True,
    to_lora=True,
    exact_base=True,
    xfail={"a_stack_is_one_around_the_other": STACKED},
)


@dataclass(frozen=True, kw_only=True)
class LoLDU(Method):
    rank: int = setting(64, "numbers trained a layer: leading columns of L, rows of U", at_least=1)
    alpha: float = setting(64.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    start: Literal["lu", "mean", "normal", "uniform", "ones", "zeros"] = setting("lu", "of z; lu: as W has it")

    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: replace(USUAL, identity=method.start == "lu"))

    def graft(self, site: Site, shared: nn.Module | None) -> LoLDUGraft:
        return LoLDUGraft(site, self)

    def size(self, site: Site) -> int:
        return self.rank
