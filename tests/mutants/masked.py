"""A method for the mutants alone: it draws a mask, which no method of the registry does yet.

W' = W + M * D        M: (out, in) of zeros and ones, drawn   D: (out, in), zero at the start
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Method, Site, Traits, WeightGraft, setting


class MaskedGraft(WeightGraft):
    mask: Tensor

    def __init__(self, site: Site, share: float) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.zeros(site.shape))
        self.register_buffer("mask", (torch.rand(site.shape) < share).float())
        nn.init.normal_(self.d)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.mask * self.d


@dataclass(frozen=True, kw_only=True)
class Masked(Method):
    share: float = setting(0.5, "share of the numbers that train", above=0, at_most=1)

    traits: ClassVar[Traits] = Traits(seams=("weight",), identity=False, linear=True)

    def graft(self, site: Site, shared: nn.Module | None) -> MaskedGraft:
        return MaskedGraft(site, self.share)
