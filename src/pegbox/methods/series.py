"""Series adapter: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), arXiv:1902.00751.

    after a projection:     z = W x + b        y = z + f(z)        D: (n, out)   U: (out, n)
    before a projection:    y = W (x + f(x)) + b                   D: (n, in)    U: (in, n)

    f(h) = s (U act(D h + d) + u)        d, u only with `bias`   U = 0 at the start

By default after the output projection of attention and of the MLP, before the residual sum, as in the paper.  The
placement before a projection (`inputs`), tanh and no biases are those of LLM-Adapters (Hu et al., 2023,
arXiv:2304.01933), whose code draws U from N(0, 0.02^2): `start="bert"`.  There s is 1 or learned; its code takes
floats only, so that a scale given as a whole number is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from pegbox.core import Base, Preset, Site, Traits, setting
from pegbox.core.bottleneck import ACTIVATIONS, BottleneckGraft, BottleneckMethod, drawn_or_not
from pegbox.core.two_sides import TwoSided


class SeriesGraft(BottleneckGraft):
    """After a projection."""

    def __init__(self, width: int, method: Series) -> None:
        super().__init__(width, width, method)
        self.activation = ACTIVATIONS[method.activation]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.changed(base(x))

    def changed(self, h: Tensor) -> Tensor:
        """h + f(h): (..., width)."""
        return h + self.widen(self.activation(self.narrow(self.drop(h))))


class BeforeGraft(SeriesGraft):
    """Before a projection."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(self.changed(x))
        return y


@dataclass(frozen=True, kw_only=True)
class Series(TwoSided, BottleneckMethod):
    targets: str | tuple[str, ...] = setting(
        ("attn.out", "mlp.down"), "projections whose outputs pass a bottleneck; () for none"
    )
    inputs: str | tuple[str, ...] = setting((), "projections whose inputs pass one, written the same way")
    activation: Literal["tanh", "relu", "gelu", "gelu_new", "silu"] = setting("tanh", "between the two projections")

    traits: ClassVar[Traits] = drawn_or_not(Traits(seams=("output",), card="llm-adapters", merge="no"))
    presets: ClassVar[dict[str, Preset]] = {
        "houlsby": Preset(
            "Houlsby et al., 2019, arXiv:1902.00751, section 2.1 and the authors' code for BERT",
            {"targets": ("attn.out", "mlp.down"), "activation": "gelu", "bias": True, "start": "houlsby"},
        ),
        "pfeiffer": Preset(
            "Pfeiffer et al., 2021, arXiv:2005.00247: after the MLP alone, 1/16 of BERT-base's width",
            {"targets": ("mlp.down",), "bottleneck": 48, "activation": "relu", "bias": True, "start": "bert"},
        ),
        "llm-adapters": Preset(
            "Hu et al., 2023, arXiv:2304.01933, code: BottleneckConfig and its targets for LLaMA",
            {"inputs": ("mlp.gate", "mlp.up"), "targets": ("mlp.down",), "bottleneck": 256, "start": "bert"},
        ),
        "llm-adapters-pfeiffer": Preset(
            "Hu et al., 2023, arXiv:2304.01933, code: use_adapterp",
            {"targets": ("mlp.down",), "bottleneck": 256, "start": "bert"},
        ),
    }

    def _width(self, site: Site) -> int:
        out, in_ = site.shape
        return in_ if self.at_input(site) else out

    def graft(self, site: Site, shared: nn.Module | None) -> SeriesGraft:
        return (BeforeGraft if self.at_input(site) else SeriesGraft)(self._width(site), self)

    def size(self, site: Site) -> int:
        width = self._width(site)
        return self.numbers(width, width)
