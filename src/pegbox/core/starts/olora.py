"""OLoRA: Orthonormal Low-Rank Adaptation (Büyükakyüz, 2024), arXiv:2406.01775.

W = Q R;  B = Q_r,  A = R_r

The authors' code and HF PEFT's take s B_0 A_0 out of the base; here it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pegbox.core.graft import check_rank
from pegbox.core.site import Site
from pegbox.core.starts import Start


@dataclass(frozen=True, kw_only=True)
class OLoRA(Start):
    apart: ClassVar[bool] = True

    @torch.no_grad()
    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        check_rank(site, rank)
        q, upper = torch.linalg.qr(site.read("weight").detach().float())
        return upper[:rank].contiguous(), q[:, :rank].contiguous()
