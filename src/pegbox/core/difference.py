"""A module trained whole that leaves the base its own: a difference from each of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pegbox.core.graft import Graft
from pegbox.core.site import Base, Site


class DifferenceGraft(Graft):
    """Runs its module with p + d in the place of each of the module's own parameters p; d = 0 at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        own = site.module.named_parameters(recurse=False)
        self.d = nn.ParameterDict({name: nn.Parameter(torch.zeros(p.shape)) for name, p in own})

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base.with_values({name: base.read(name) + d for name, d in self.d.items()})(x)
        return y
