"""EVA: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation (Paischer et al., 2024),
arXiv:2410.07170.

    y = W x + s B A x        A: (r_l, in), the first principal directions of the layer's inputs        B = 0

LoRA that looks at some batches before it trains: rows of A are the directions in which a layer's inputs vary most, and
layers whose directions explain more of their variance get more of the ranks, up to `rho` times `rank`.  The start is a
file of its own (`pegbox.core.starts.eva`), so that every method with LoRA's factors takes it: `start=eva`.

HF PEFT counts only tokens that are to be predicted (`start_settings.labelled`); the paper's runs mostly all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pegbox.core import Preset, Traits, setting
from pegbox.methods.lora import LAYOUT, USUAL, LoRA


@dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    start: str = setting("eva", "where A and B start")

    traits: ClassVar[Traits] = replace(USUAL, card="eva", peft=replace(LAYOUT, claims=False))
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("Paischer et al., 2024, arXiv:2410.07170, code: language runs", {"rank": 16, "alpha": 1.0}),
    }
