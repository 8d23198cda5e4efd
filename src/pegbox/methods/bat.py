"""BAT, the first Bone: Block Affine Transformation (Kang and Yin, 2024), arXiv:2409.15371 version 1.

    cut W (out, in) into r x r blocks; every block W_ab of block row a shares one B_a (r, r):

    W_ab' = W_ab (I + B_a) + B_a        B: (out / r, r, r), zero at the start

r divides both sides.  The change depends on W and is of full rank in general, so there is no cheaper form than the
product with W itself.  The authors' older code also has B per block column, and two matrices; HF PEFT and this have
only the published one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Method, PeftLayout, Site, Traits, WeightGraft, setting
from pegbox.core.errors import SettingsError


class BATGraft(WeightGraft):
    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        out, in_ = site.shape
        if out % rank or in_ % rank:
            raise SettingsError(f"rank must divide both sides of the {out} x {in_} weight at {site.path}, got {rank}")
        self.rank = rank
        self.b = nn.Parameter(torch.zeros(out // rank, rank, rank))

    def weight(self, w: Tensor) -> Tensor:
        blocks = w.unflatten(0, (-1, self.rank)).unflatten(2, (-1, self.rank)).transpose(1, 2)  # (out/r, in/r, r, r)
        b = self.b[:, None]
        return (blocks + blocks @ b + b).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class BAT(Method):
    rank: int = setting(64, "side of a block; divides both sides of every weight", at_least=1)

    traits: ClassVar[Traits] = Traits(
        seams=("weight",),
        card="bone",
        linear=True,
        peft=PeftLayout(
            "MISS",
            tensors={"b": "miss_block"},
            fields={"rank": "r"},
            marks={"init_weights": "bat"},
            fixed={"bias": "none", "miss_dropout": 0.0},
        ),
    )

    def graft(self, site: Site, shared: nn.Module | None) -> BATGraft:
        return BATGraft(site, self.rank)

    def size(self, site: Site) -> int:
        return self.rank * site.shape[0]
