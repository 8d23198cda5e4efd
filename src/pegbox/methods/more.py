"""MoRe: MoRe Fine-Tuning with 10x Fewer Parameters (Tan et al., 2024), arXiv:2408.17383.

    y = W x + M x        M: a Monarch matrix (Dao et al., 2022, arXiv:2204.00595), see `pegbox.core.monarch`
                         R: (N, r, in / N)   L: (N, out / N, r) = 0 at the start

r (in + out) numbers, as a LoRA of rank r has, but M may have a rank of N r.  Where N does not divide a side, blocks are
rounded up, the inputs padded and the outputs cut off.  There is no alpha.

The authors drop outputs of M while training, in their Llama runs; so does `dropout`.  Their wrapper with a scale and a
LayerNorm, which is no map of the weight, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Base, Method, Preset, Site, Traits, WeightGraft, setting
from pegbox.core.errors import SettingsError
from pegbox.core.monarch import dense, multiply


class MoReGraft(WeightGraft):
    def __init__(self, site: Site, method: MoRe) -> None:
        super().__init__()
        out, in_ = site.shape
        n = method.blocks
        if n > min(out, in_):
            raise SettingsError(f"blocks must be 1..{min(out, in_)} at {site.path} (a {out} x {in_} weight), got {n}")
        self.dropout = method.dropout
        self.right = nn.Parameter(torch.empty(n, method.rank, math.ceil(in_ / n)))
        self.left = nn.Parameter(torch.zeros(n, math.ceil(out / n), method.rank))
        bound = 1 / math.sqrt(self.right.shape[2])
        nn.init.uniform_(self.right, -bound, bound)

    def weight(self, w: Tensor) -> Tensor:
        return w + dense(self.right, self.left, *w.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        return y + nn.functional.dropout(multiply(x, self.right, self.left, y.shape[-1]), self.dropout, self.training)


@dataclass(frozen=True, kw_only=True)
class MoRe(Method):
    blocks: int = setting(4, "N, diagonal blocks of each factor", at_least=1)
    rank: int = setting(4, "r, channels between a block of R and one of L", at_least=1)
    dropout: float = setting(0.0, "share of the update's outputs dropped while training", at_least=0, below=1)

    traits: ClassVar[Traits] = Traits(seams=("weight",), card="monarch")
    presets: ClassVar[dict[str, Preset]] = {
        "llama": Preset("Tan et al., 2024, arXiv:2408.17383, code: Llama-7B", {"rank": 8, "dropout": 0.1}),
    }

    def graft(self, site: Site, shared: nn.Module | None) -> MoReGraft:
        return MoReGraft(site, self)

    def size(self, site: Site) -> int:
        out, in_ = (self.blocks * math.ceil(side / self.blocks) for side in site.shape)
        return self.rank * (out + in_)
