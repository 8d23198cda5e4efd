"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + s B A x        A: (r, in)   B: (out, r), B = 0 at the start   s = alpha / r

W is frozen.  A starts uniform as in the authors' code, not Gaussian as in the paper's text.

Two one-line variants are settings: `rslora`, s = alpha / sqrt(r) (Kalajdzievski, 2023, arXiv:2312.03732), and
`b_rate`, a learning rate for B that many times A's (LoRA+, Hayou et al., 2024, arXiv:2402.12354; 16 there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pegbox.core import Down, LowRankGraft, Method, PeftLayout, Site, Traits, low_rank_pair, setting


class LoRAGraft(LowRankGraft):
    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__()
        self.a, self.b = low_rank_pair(site, method.rank)
        self.scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
        self.dropout, self.b_rate = method.dropout, method.b_rate

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.a, self.b, self.scale

    def rates(self) -> dict[str, float]:
        return {"b": self.b_rate}


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    rank: int = setting(16, "rank of the update: rows of A, columns of B", at_least=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    b_rate: float = setting(1.0, "learning rate of B as a multiple of A's (LoRA+ uses 16)", above=0)

    traits: ClassVar[Traits] = Traits(
        seams=("weight", "update"),
        card="llm-adapters",
        to_lora=True,
        peft=PeftLayout(
            "LORA",
            tensors={"a": "lora_A.weight", "b": "lora_B.weight"},
            fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
            fixed={
                "use_dora": False,
                "bias": "none",
                "rank_pattern": {},
                "alpha_pattern": {},
                "lora_bias": False,
                "layer_replication": None,
                "target_parameters": None,
                "trainable_token_indices": None,
            },
            allowed={"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")},  # others change the base
        ),
    )

    def graft(self, site: Site, shared: nn.Module | None) -> LoRAGraft:
        return LoRAGraft(site, self)

    def size(self, site: Site) -> int:
        return self.rank * sum(site.shape)
