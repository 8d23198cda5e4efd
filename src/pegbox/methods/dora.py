"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), arXiv:2402.09353.

    W' = m * (W + s B A) / |W + s B A|        m: (out,), |.| over each output's row, m = |W| at the start

A: (r, in) and B: (out, r) as in LoRA.  The norm counts as a constant in the gradient (the paper's section 4.3).
It is never taken of a materialised sum:  |W + sBA|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B  row by row.

The paper writes columns of W (in, out); here rows of W (out, in), as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Base, Method, PeftLayout, Site, Traits, WeightGraft, low_rank_pair, rescale, setting


class DoRAGraft(WeightGraft):
    square: Tensor

    def __init__(self, site: Site, method: DoRA) -> None:
        super().__init__()
        self.a, self.b = low_rank_pair(site, method.rank)
        self.scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
        self.dropout = method.dropout
        square = site.read("weight").detach().float().square().sum(1)  # (out,)
        self.register_buffer("square", square, persistent=False)
        self.m = nn.Parameter(square.sqrt())

    def weight(self, w: Tensor) -> Tensor:
        v = w + self.scale * (self.b @ self.a)
        return (self.m / v.detach().norm(dim=1))[:, None] * v

    @torch.no_grad()
    def norm(self, w: Tensor) -> Tensor:
        """|W + s B A| of each row: (out,), for the W that the graft was made on."""
        b = self.scale * self.b
        cross = (w @ self.a.to(w.dtype).T) * b  # (out, r)
        product = b @ (self.a @ self.a.T) * b  # (out, r)
        return (self.square + (2 * cross + product).sum(1)).clamp_min(0).sqrt()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if base.grafts or base.values:  # another W than the one `square` was taken of
            return super().forward(base, x)
        factor = self.m / self.norm(base.read("weight"))
        dropped = nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None
        y = base.low_rank(x, self.a, self.b, self.scale, dropped=dropped, bias=False)
        return rescale(y, factor, base.read("bias") if base.site.has("bias") else None)


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    rank: int = setting(16, "rank of the update: rows of A, columns of B", at_least=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")

    traits: ClassVar[Traits] = Traits(
        seams=("weight",),
        peft=PeftLayout(
            "LORA",
            tensors={"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"},
            fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
            marks={"use_dora": True},
            fixed={
                "bias": "none",
                "rank_pattern": {},
                "alpha_pattern": {},
                "lora_bias": False,
                "layer_replication": None,
                "target_parameters": None,
                "trainable_token_indices": None,
            },
            allowed={"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")},
        ),
    )

    def graft(self, site: Site, shared: nn.Module | None) -> DoRAGraft:
        return DoRAGraft(site, self)

    def size(self, site: Site) -> int:
        return self.rank * sum(site.shape) + site.shape[0]
