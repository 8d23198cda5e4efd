"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), arXiv:2402.09353.

    W' = m * (W + s B A) / |W + s B A|        m: (out,), |.| over each output's row, m = |W| at the start

A: (r, in) and B: (out, r) as in LoRA, with its starts (`start`); where they are taken from W, B A stands for
B A - B_0 A_0.  The norm counts as a constant in the gradient (the paper's section 4.3).
It is never taken of a materialised sum:  |W + sBA|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B  row by row.

The paper writes columns of W (in, out); here rows of W (out, in), as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Base, PeftLayout, Site, Traits, WeightGraft, by_settings, rescale
from pegbox.core.low_rank_start import (
    PEFT_FIELDS,
    PEFT_FIXED,
    PEFT_STARTS,
    PEFT_TRAINS_ALL,
    LowRankMethod,
    StartedFactors,
)


class DoRAGraft(StartedFactors, WeightGraft):
    square: Tensor

    def __init__(self, site: Site, method: DoRA) -> None:
        super().__init__()
        self.start(site, method)
        self.scale, self.dropout = method.factor_at(site.path), method.dropout
        square = site.read("weight").detach().float().square().sum(1)  # (out,)
        self.register_buffer("square", square, persistent=False)
        self.m = nn.Parameter(square.sqrt())

    def weight(self, w: Tensor) -> Tensor:
        a, b = self.difference()
        v = w + self.scale * (b @ a)
        return (self.m / v.detach().norm(dim=1))[:, None] * v

    @torch.no_grad()
    def norm(self, w: Tensor) -> Tensor:
        """|W + s B A| of each row: (out,), for the W that the graft was made on."""
        a, b = self.difference()
        b = self.scale * b
        cross = (w @ a.to(w.dtype).T) * b  # (out, r)
        product = b @ (a @ a.T) * b  # (out, r)
        return (self.square + (2 * cross + product).sum(1)).clamp_min(0).sqrt()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if base.grafts or base.values:  # another W than the one `square` was taken of
            return super().forward(base, x)
        factor = self.m / self.norm(base.read("weight"))
        dropped = nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None
        y = base.low_rank(x, *self.difference(), self.scale, dropped=dropped, bias=False)
        return rescale(y, factor, base.read("bias") if base.site.has("bias") else None)


USUAL = Traits(
    seams=("weight",),
    peft=PeftLayout(
        "LORA",
        tensors={"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"},
        fields=PEFT_FIELDS,
        fixed=PEFT_FIXED,
        marks={"use_dora": True},
        allowed={"init_lora_weights": PEFT_STARTS},
        embedding={"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector"},
        convolution={"a": "kernel", "b": "point", "m": "channel"},
    ),
)
APART = replace(USUAL, xfail={"peft_loads_ours": PEFT_TRAINS_ALL})


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: APART if method.apart else USUAL)

    def graft(self, site: Site, shared: nn.Module | None) -> DoRAGraft | None:
        return DoRAGraft(site, self) if self.rank_at(site.path) else None

    def size(self, site: Site) -> int:
        return self.rank_at(site.path) * sum(site.shape) + site.shape[0]
