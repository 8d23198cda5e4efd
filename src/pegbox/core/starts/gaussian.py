"""As HF PEFT's `gaussian`, after the text of LoRA's paper: A from N(0, 1 / r^2), B = 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox.core.graft import check_rank
from pegbox.core.site import Site
from pegbox.core.starts import Start


@dataclass(frozen=True, kw_only=True)
class Gaussian(Start):
    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        out, in_ = check_rank(site, rank)
        return torch.randn(rank, in_) / rank, torch.zeros(out, rank)
