"""Series adapter: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), arXiv:1902.00751.

    z = W x + b        y = z + s U act(D z)        D: (n, out)   U: (out, n), U = 0 at the start

A bottleneck after the output projection of attention and of the MLP, before the residual sum.  The projections have
no bias and tanh is the default, as in LLM-Adapters (Hu et al., 2023, arXiv:2304.01933); the authors' code there draws
U from N(0, 0.02^2), which `identity=False` brings back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Base, Graft, Method, Site, Traits, setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class SeriesGraft(Graft):
    def __init__(self, site: Site, method: Series) -> None:
        super().__init__()
        width = site.shape[0]
        self.down = nn.Parameter(torch.empty(method.bottleneck, width))
        self.up = nn.Parameter(torch.zeros(width, method.bottleneck))
        self.scale, self.dropout = method.scale, method.dropout
        self.activation = ACTIVATIONS[method.activation]
        nn.init.normal_(self.down, std=0.02)
        if not method.identity:
            nn.init.normal_(self.up, std=0.02)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        z = base(x)
        h = F.dropout(z, self.dropout, self.training)
        return z + self.scale * F.linear(self.activation(F.linear(h, self.down)), self.up)


@dataclass(frozen=True, kw_only=True)
class Series(Method):
    targets: str | tuple[str, ...] = setting(("attn.out", "mlp.down"), "the output projections to follow")
    bottleneck: int = setting(64, "width of the bottleneck", at_least=1)
    activation: Literal["tanh", "relu", "gelu", "silu"] = setting("tanh", "between the two projections")
    scale: float = setting(1.0, "multiplies what is added")
    dropout: float = setting(0.0, "share of the bottleneck's inputs dropped while training", at_least=0, below=1)
    identity: bool = setting(True, "start with U = 0; otherwise with both drawn small, as LLM-Adapters does")

    traits: ClassVar[Traits] = Traits(seams=("output",), card="llm-adapters", merge="no")

    def graft(self, site: Site, shared: nn.Module | None) -> SeriesGraft:
        return SeriesGraft(site, self)

    def size(self, site: Site) -> int:
        return 2 * self.bottleneck * site.shape[0]
