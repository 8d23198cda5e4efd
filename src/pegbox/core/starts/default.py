"""As LoRA's authors' code: A uniform in +-1 / sqrt(in), B = 0 (Hu et al., 2021), arXiv:2106.09685."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pegbox.core.graft import low_rank_pair
from pegbox.core.site import Site
from pegbox.core.starts import Start


@dataclass(frozen=True, kw_only=True)
class Default(Start):
    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        a, b = low_rank_pair(site, rank)
        return a.detach(), b.detach()
