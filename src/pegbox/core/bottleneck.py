"""The bottleneck of adapter layers: two thin projections with a non-linearity between them.

    f(h) = s (U act(D h + d) + u)        D: (n, in)   U: (out, n)   d: (n,)   u: (out,)   s: a number, trained or not

Where it stands in a model, and what it reads, is each method's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.graft import Graft
from pegbox.core.method import Method, Traits, by_settings
from pegbox.core.settings import setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True, kw_only=True)
class BottleneckMethod(Method):
    """The settings of every bottleneck."""

    bottleneck: int = setting(64, "width of the bottleneck", at_least=1)
    scale: float = setting(1.0, "multiplies what is added")
    learn_scale: bool = setting(False, "train the scale too, from that value")
    bias: bool = setting(False, "give both projections a bias")
    dropout: float = setting(0.0, "share of the bottleneck's inputs dropped while training", at_least=0, below=1)
    start: Literal["zero", "bert", "houlsby"] = setting(
        "zero", "U = 0 (the base's outputs), or both projections drawn with a deviation of 0.02, or of 0.001"
    )

    def numbers(self, in_: int, out: int) -> int:
        """Trained numbers of one bottleneck."""
        biases = self.bottleneck + out if self.bias else 0
        return self.bottleneck * (in_ + out) + biases + int(self.learn_scale)


def drawn_or_not(traits: Traits) -> Any:
    """Traits of a bottleneck: it starts as the base unless both projections are drawn, and large enough to tell."""
    drawn = replace(traits, identity=False)
    return by_settings(traits, lambda method: drawn if method.start == "bert" else traits)


class BottleneckGraft(Graft):
    """Holds a bottleneck; a subclass says in `forward` what it reads and where its result goes."""

    def __init__(self, in_: int, out: int, method: BottleneckMethod) -> None:
        super().__init__()
        self.down, self.up = projections(in_, out, method)
        self.down_bias = nn.Parameter(torch.zeros(method.bottleneck)) if method.bias else None
        self.up_bias = nn.Parameter(torch.zeros(out)) if method.bias else None
        self.scale = scale_of(method)
        self.dropout = method.dropout

    def narrow(self, h: Tensor) -> Tensor:
        """D h + d: (..., in) -> (..., n)."""
        return F.linear(h, self.down, self.down_bias)

    def widen(self, z: Tensor) -> Tensor:
        """s (U z + u): (..., n) -> (..., out).  The scale goes into the small factor."""
        return F.linear(z, self.scale * self.up, None if self.up_bias is None else self.scale * self.up_bias)

    def drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training)


def scale_of(method: BottleneckMethod) -> nn.Parameter | float:
    """s: a number, or a trained one."""
    return nn.Parameter(torch.tensor(method.scale)) if method.learn_scale else method.scale


def projections(in_: int, out: int, method: BottleneckMethod) -> tuple[nn.Parameter, nn.Parameter]:
    """D (n, in) and U (out, n) at their start.

    `zero`: D uniform as He et al. (2022, arXiv:2110.04366) draw it.  `bert`: BERT's deviation of 0.02, the default of
    LLM-Adapters.  `houlsby`: normal within two deviations, as in the code of Houlsby et al.
    """
    down, up = nn.Parameter(torch.empty(method.bottleneck, in_)), nn.Parameter(torch.zeros(out, method.bottleneck))
    if method.start == "zero":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    for matrix in (down, up):
        if method.start == "bert":
            nn.init.normal_(matrix, std=0.02)
        elif method.start == "houlsby":
            nn.init.trunc_normal_(matrix, std=1e-3, a=-2e-3, b=2e-3)
    return down, up
