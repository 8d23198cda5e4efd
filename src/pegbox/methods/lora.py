"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    y = W x + s B A x        A: (r, in)   B: (out, r), B = 0 at the start   s = alpha / r

W is frozen.  A starts uniform as in the authors' code, not Gaussian as in the paper's text.

One-line variants are settings: `rslora`, s = alpha / sqrt(r) (Kalajdzievski, 2023, arXiv:2312.03732); `b_rate`, a
learning rate for B that many times A's (LoRA+, Hayou et al., 2024, arXiv:2402.12354; 16 there); and `start`, by which A
and B come from W (`pissa`, `olora`), from activations (`eva`) or from gradients (`lora_ga`):

    y = W x + s (B A - B_0 A_0) x        pissa: s B_0 A_0 = the r largest singular values of W
                                         olora: W = Q R, B_0 = Q_r, A_0 = R_r

The authors of such starts take s B_0 A_0 out of W; here W stays, with frozen A_0 and B_0 beside the factors, so that
the adapter is a change of the original base.  Its file is the LoRA of rank 2 r that it is.  With dropout, theirs drops
inputs of the part taken out too, this of the change alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from pegbox.core import Down, LowRankGraft, PeftLayout, Preset, Site, Traits, by_settings, setting
from pegbox.core.low_rank_start import (
    PEFT_FIELDS,
    PEFT_FIXED,
    PEFT_STARTS,
    PEFT_TRAINS_ALL,
    LowRankMethod,
    StartedFactors,
)


class LoRAGraft(StartedFactors, LowRankGraft):
    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__()
        self.start(site, method)
        self.scale, self.dropout, self.b_rate = method.factor_at(site.path), method.dropout, method.b_rate

    def factors(self) -> tuple[Down, Tensor, float]:
        return *self.difference(), self.scale

    def rates(self) -> dict[str, float]:
        return {"b": self.b_rate}


LAYOUT = PeftLayout(
    "LORA",
    tensors={"a": "lora_A.weight", "b": "lora_B.weight"},
    fields=PEFT_FIELDS,
    fixed=PEFT_FIXED | {"use_dora": False},
    allowed={"init_lora_weights": PEFT_STARTS},
    embedding={"a": "lora_embedding_A", "b": "lora_embedding_B"},
    convolution={"a": "kernel", "b": "point"},
)
USUAL = Traits(seams=("weight", "update"), card="llm-adapters", to_lora=True, peft=LAYOUT)
APART = replace(USUAL, xfail={"peft_loads_ours": PEFT_TRAINS_ALL})


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    b_rate: float = setting(1.0, "learning rate of B as a multiple of A's (LoRA+ uses 16)", above=0)

    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: APART if method.apart else USUAL)
    presets: ClassVar[dict[str, Preset]] = {
        "llm-adapters": Preset(
            "Hu et al., 2023, arXiv:2304.01933, code: the released runs on LLaMA",
            {
                "rank": 32,
                "alpha": 64.0,
                "dropout": 0.05,
                "targets": ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down"),
            },
        ),
    }

    def graft(self, site: Site, shared: nn.Module | None) -> LoRAGraft | None:
        return LoRAGraft(site, self) if self.rank_at(site.path) else None
