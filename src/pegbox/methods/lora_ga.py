"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., 2024), arXiv:2407.05000.

    y = W x + s (B A - B_0 A_0) x        A_0: (r, in), B_0: (out, r), of the first 2 r singular vectors of dLoss / dW

LoRA whose first step is as near to full tuning's as rank 2 r allows: it takes the gradient of W on some batches before
it trains.  The start is a file of its own (`pegbox.core.starts.lora_ga`), so that every method with LoRA's factors
takes it: `start=lora_ga`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pegbox.core import Preset, Traits, setting
from pegbox.methods.lora import APART, LAYOUT, LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAGA(LoRA):
    rslora: bool = setting(True, "scale by alpha / sqrt(rank) instead, as the authors' experiments")
    start: str = setting("lora_ga", "where A and B start")

    traits: ClassVar[Traits] = replace(APART, card="lora-ga", peft=replace(LAYOUT, claims=False))
    presets: ClassVar[dict[str, Preset]] = {
        "t5": Preset("Wang et al., 2024, arXiv:2407.05000, code: T5-base on GLUE", {"rank": 8, "alpha": 16.0}),
        "llama": Preset("Wang et al., 2024, arXiv:2407.05000, code: Llama-2-7B", {"rank": 32, "alpha": 8.0}),
    }
