"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
(Liu et al., 2022), arXiv:2205.05638.

    outputs (keys, values):          y = l * (W x + b)      W' = diag(l) W,  b' = l * b      l: (out,)
    inputs (the MLP's last matrix):  y = W (l * x) + b      W' = W diag(l)                   l: (in,)

l = 1 at the start.  The paper scales keys, values and the MLP's inner activation, which is what its last projection
reads.  HF PEFT keeps l as (out, 1) and (1, in), and scales the queries instead of the keys in some architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Base, PeftLayout, Site, Traits, WeightGraft, setting
from pegbox.core.adapter import Adapter, State, path_of
from pegbox.core.two_sides import TwoSided

LEAF, PEFT_ROOT = "ia3_l", "base_model.model."


class OutputGraft(WeightGraft):
    """Scales what a module gives."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.shape[0]))
        self.maps = ("weight", "bias") if site.has("bias") else ("weight",)

    def weight(self, w: Tensor) -> Tensor:
        return self.l[:, None] * w

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        return self.l * w if parameter == "bias" else self.weight(w)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.l.to(y.dtype)


class InputGraft(WeightGraft):
    """Scales what a module reads."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.shape[1]))

    def weight(self, w: Tensor) -> Tensor:
        return w * self.l

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x * self.l.to(x.dtype))
        return y


@dataclass(frozen=True, kw_only=True)
class IA3(TwoSided):
    targets: str | tuple[str, ...] = setting(("attn.k", "attn.v"), "the projections whose outputs are scaled")
    inputs: str | tuple[str, ...] = setting("mlp.down", "those whose inputs are scaled, written the same way")

    traits: ClassVar[Traits] = Traits(
        seams=("weight",),
        card="peft-survey",
        linear=True,
        peft=PeftLayout("IA3", tensors={"l": LEAF}),
    )

    def graft(self, site: Site, shared: nn.Module | None) -> WeightGraft:
        return InputGraft(site) if self.at_input(site) else OutputGraft(site)

    def size(self, site: Site) -> int:
        return site.shape[self.at_input(site)]

    # HF PEFT's files: l as a column or a row, and the names of those that scale inputs

    def file_config(self, adapter: Adapter) -> dict[str, Any] | None:
        grafts = {path_of(key): graft for key, graft in adapter.grafts.items()}
        if any("[" in path for path in grafts):  # rows of a matrix, which PEFT has no name for
            return None
        before = [path for path, graft in grafts.items() if isinstance(graft, InputGraft)]
        return {
            "peft_type": "IA3",
            "inference_mode": True,
            "target_modules": list(grafts),
            "feedforward_modules": before,
        }

    def to_file(self, model: nn.Module, adapter: Adapter, state: State) -> State | None:
        if self.file_config(adapter) is None:
            return None
        out: State = {}
        for key, graft in adapter.grafts.items():
            path = path_of(key)
            row = state[f"graft.{path}.l"][None]  # (1, n)
            out[f"{PEFT_ROOT}{path}.{LEAF}"] = row if isinstance(graft, InputGraft) else row.T
        return out

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        before = config.get("feedforward_modules") or ()
        return {"inputs": before if isinstance(before, str) else tuple(before)}

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.flatten() for name, value in tensors.items()}
