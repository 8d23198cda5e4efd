"""Parallel adapter: LLM-Adapters (Hu et al., 2023), arXiv:2304.01933; first in He et al. (2022), arXiv:2110.04366.

    y = W x + b + s (U act(D x + d) + u)        D: (n, in)   U: (out, n), U = 0 at the start   d, u only with `bias`

The paper's adapter stands beside a whole sub-layer of attention or MLP; its code, and this, beside one projection.
Where the activation is the identity this is LoRA with s in the place of alpha / r: it merges, and has traits of its
own.  The code draws U from N(0, 0.02^2), `start="bert"`, and names q, k and v as targets; the released runs are those
of the preset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from pegbox.core import Base, Down, Graft, LowRankGraft, Preset, Site, Traits, by_settings, setting
from pegbox.core.bottleneck import ACTIVATIONS, BottleneckGraft, BottleneckMethod, projections, scale_of
from pegbox.core.errors import SettingsError


class ParallelGraft(BottleneckGraft):
    def __init__(self, site: Site, method: Parallel) -> None:
        out, in_ = site.shape
        super().__init__(in_, out, method)
        self.activation = ACTIVATIONS[method.activation]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + self.widen(self.activation(self.narrow(self.drop(x))))


class LinearGraft(LowRankGraft):
    """Without a non-linearity: a map of the weight."""

    def __init__(self, site: Site, method: Parallel) -> None:
        super().__init__()
        out, in_ = site.shape
        if method.bias:
            raise SettingsError(f"parallel.bias must be false where activation='identity': {site.path} could not merge")
        self.down, self.up = projections(in_, out, method)
        self.scale, self.dropout = scale_of(method), method.dropout

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.down, self.scale * self.up, 1.0


def _traits(method: Parallel) -> Traits:
    traits = LINEAR if method.activation == "identity" else PARALLEL
    return replace(traits, identity=method.start != "bert")


PARALLEL = Traits(seams=("output",), card="llm-adapters", merge="no")
LINEAR = Traits(seams=("weight",), card="llm-adapters", to_lora=True)


@dataclass(frozen=True, kw_only=True)
class Parallel(BottleneckMethod):
    targets: str | tuple[str, ...] = setting(("mlp.up", "mlp.down"), "the projections beside which it stands")
    activation: Literal["tanh", "relu", "gelu", "gelu_new", "silu", "identity"] = setting(
        "tanh", "between the two projections; with identity it merges"
    )

    traits: ClassVar[Traits] = by_settings(PARALLEL, _traits)
    presets: ClassVar[dict[str, Preset]] = {
        "llm-adapters": Preset(
            "Hu et al., 2023, arXiv:2304.01933, code: BottleneckConfig and the released runs",
            {"targets": ("mlp.up", "mlp.down"), "bottleneck": 256, "start": "bert"},
        ),
        "llm-adapters-qkv": Preset(
            "Hu et al., 2023, arXiv:2304.01933, code: its targets for LLaMA where none are given",
            {"targets": ("attn.q", "attn.k", "attn.v"), "bottleneck": 256, "start": "bert"},
        ),
    }

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        return (LinearGraft if self.activation == "identity" else ParallelGraft)(site, self)

    def size(self, site: Site) -> int:
        out, in_ = site.shape
        return self.numbers(in_, out)
