"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., 2024), arXiv:2404.02948.

W = U S V^T;  B = U_r (S_r / s)^1/2,  A = (S_r / s)^1/2 V_r^T

The authors' code and HF PEFT's take s B_0 A_0 out of the base; here it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pegbox.core.graft import check_rank
from pegbox.core.settings import setting
from pegbox.core.site import Site
from pegbox.core.starts import Start


@dataclass(frozen=True, kw_only=True)
class PiSSA(Start):
    niter: int | None = setting(None, "iterations of a fast, drawn SVD; the exact one if none", at_least=0)

    apart: ClassVar[bool] = True

    @torch.no_grad()
    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        check_rank(site, rank)
        w = site.read("weight").detach().float()
        if self.niter is None:
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(w, rank, niter=self.niter)
            vt = v.T
        root = (s[:rank] / scale).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
