"""NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models (Guo et al., 2025), arXiv:2502.14482.

    y = W x + s B N A x        A: (r, in)   N: (r, r)   B: (out, r)   s = alpha / r

Where the three start from is `start`:

    nystrom (NLoRA):  A = W[:r, :]   B = W[:, :r]   N = W[:r, :r], the leading rows, columns and corner
    random  (SLoRA):  A, N uniform as LoRA's A      B = 0

`train="middle"` (IntTune) keeps A and B as they are and trains N alone: r^2 numbers, and a file of as many.

The Nyström approximation of W has the pseudo-inverse of the corner in the place of N; the authors' code, which this
follows, has the corner itself.  They leave s B N A in the model, which is then not the base at the start.  With
`subtract` the start is taken out, as PiSSA does: W' = W + s (B N A - B_0 N_0 A_0), the base staying as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Down, LowRankGraft, Method, Preset, Site, Traits, by_settings, setting
from pegbox.core.errors import SettingsError
from pegbox.core.graft import check_rank


class NLoRAGraft(LowRankGraft):
    a: Tensor
    n: Tensor
    b: Tensor
    a0: Tensor | None
    n0: Tensor | None
    b0: Tensor | None

    def __init__(self, site: Site, method: NLoRA) -> None:
        super().__init__()
        self.scale, self.dropout = method.factor, method.dropout
        start = _corner(site, method.rank) if method.start == "nystrom" else _drawn(site, method.rank)
        for name, value in zip("anb", start, strict=True):
            if method.train == "middle" and name != "n":
                self.register_buffer(name, value, persistent=False)  # the base has it
            else:
                setattr(self, name, nn.Parameter(value.clone()))
            self.register_buffer(f"{name}0", value if method.subtract else None)

    def factors(self) -> tuple[Down, Tensor, float]:
        down = self.n @ self.a
        if self.a0 is None or self.n0 is None or self.b0 is None:
            return down, self.b, self.scale
        # B N A - B_0 N_0 A_0 = (B - B_0) N A + B_0 (N A - N_0 A_0), zero to the last bit at the start
        downs, ups = [down, down - self.n0 @ self.a0], [self.b - self.b0, self.b0]
        return torch.cat(downs), torch.cat(ups, dim=1), self.scale


def _corner(site: Site, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W's leading rows (r, in), its corner (r, r), its leading columns (out, r)."""
    check_rank(site, rank)
    w = site.read("weight").detach().float()
    return w[:rank].clone(), w[:rank, :rank].clone(), w[:, :rank].clone()


def _drawn(site: Site, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    out, in_ = check_rank(site, rank)
    a, n = torch.empty(rank, in_), torch.empty(rank, rank)
    for factor in (a, n):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return a, n, torch.zeros(out, rank)


STACKED = "A and B are those of the base beneath it, which differs where another adapter has been merged"
USUAL = Traits(seams=("weight",), card="nlora", identity=False, to_lora=True)


def _traits(method: NLoRA) -> Traits:
    usual = replace(USUAL, identity=method.start == "random" or method.subtract)
    if method.train == "all":
        return usual
    return replace(usual, linear=True, xfail={"a_stack_is_one_around_the_other": STACKED})


@dataclass(frozen=True, kw_only=True)
class NLoRA(Method):
    rank: int = setting(128, "rows of A, columns of B, and both of N", at_least=1)
    alpha: float = setting(128.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    start: Literal["nystrom", "random"] = setting("nystrom", "the factors are parts of W, or A and N drawn and B = 0")
    subtract: bool = setting(False, "take the start out, so that the untrained adapter changes nothing")
    train: Literal["all", "middle"] = setting("all", "the three factors, or N alone")

    traits: ClassVar[Traits] = by_settings(USUAL, _traits)
    presets: ClassVar[dict[str, Preset]] = {
        "slora": Preset("Guo et al., 2025, arXiv:2502.14482, SLoRA", {"start": "random"}),
        "inttune": Preset("Guo et al., 2025, arXiv:2502.14482, IntTune", {"train": "middle"}),
    }

    @property
    def factor(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def graft(self, site: Site, shared: nn.Module | None) -> NLoRAGraft:
        if self.start == "random" and (self.subtract or self.train == "middle"):
            wrong = "subtract" if self.subtract else "train='middle'"
            raise SettingsError(f"{wrong} is of start='nystrom'; with start='random' B is zero")
        return NLoRAGraft(site, self)

    def size(self, site: Site) -> int:
        return self.rank**2 + (self.rank * sum(site.shape) if self.train == "all" else 0)
