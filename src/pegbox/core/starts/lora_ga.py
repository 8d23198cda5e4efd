"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., 2024), arXiv:2407.05000.

G = dLoss / dW, the mean over some batches, G = U S V^T;  A_0 = c V_r^T,  B_0 = c U_(r+1..2r)

so that the first step of A and B moves W as nearly as rank 2 r can to where full tuning would: of the first 2 r
singular vectors A and B have a part each.  `direction` says which: `ArB2r` as above, `A2rBr` the other way round,
`ArBr` every second one, `random` a drawn half.  `scale` is c: `stable`, out^(1/4) / gamma^(1/2); `gd`, 1 / s; `unit`,
1; `weight`, the mean of (sigma_j(W) / s)^1/2 over the r largest singular values of W.

The authors take s B_0 A_0 out of the base; here it stays.  HF PEFT's differs from both, as it has the gradient's
singular values in B, and the scale in B alone.  The settings of the authors' experiments use rsLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pegbox.core.errors import SettingsError
from pegbox.core.seeding import seeded
from pegbox.core.settings import setting
from pegbox.core.site import Site
from pegbox.core.starts import Start

if TYPE_CHECKING:
    from pegbox.core.calibration import Data
    from pegbox.core.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Start):
    batches: int = setting(8, "batches that the gradient is the mean of", at_least=1)
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = setting("ArB2r", "which singular vectors A and B have")
    scale: Literal["stable", "gd", "unit", "weight"] = setting("stable", "length of the rows of A and columns of B")
    gamma: float = setting(16.0, "of scale=stable; the larger, the smaller the start", above=0)
    niter: int = setting(4, "iterations of the drawn SVD", at_least=0)

    apart: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """As LoRA's, until there is a gradient."""
        out, in_ = site.shape
        if 2 * rank > min(out, in_):
            raise SettingsError(
                f"start=lora_ga takes 2 rank singular vectors, so rank must be 1..{min(out, in_) // 2} at {site.path} "
                f"(a {out} x {in_} weight), got {rank}"
            )
        return super().factors(site, rank, scale)

    def look(self, tuned: Tuned, name: str, data: Data) -> None:
        from pegbox.core.low_rank_start import LowRankMethod, started
        from pegbox.core.observe import gradients

        method, grafts = tuned.adapter(name).method, started(tuned, name)
        assert isinstance(method, LowRankMethod)
        for path, gradient in gradients(tuned, data, grafts, most=self.batches):
            with seeded(0, path):
                a, b = self.split(gradient, method.rank_at(path))
            c = self.length(tuned.sites[path], method.rank_at(path), method.factor_at(path))
            grafts[path].begin(c * a, c * b)

    def split(self, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Rows of A (r, in) and columns of B (out, r), each of length 1, of a gradient (out, in)."""
        u, _, v = torch.svd_lowrank(gradient, min(4 * rank, *gradient.shape), niter=self.niter)
        first = torch.arange(rank)
        of_a, of_b = {
            "ArB2r": (first, first + rank),
            "A2rBr": (first + rank, first),
            "ArBr": (2 * first, 2 * first + 1),
            "random": tuple(torch.randperm(2 * rank).chunk(2)),
        }[self.direction]
        return v.T[of_a], u[:, of_b]

    @torch.no_grad()
    def length(self, site: Site, rank: int, scale: float) -> float:
        """c."""
        if self.scale == "stable":
            return site.shape[0] ** 0.25 / self.gamma**0.5
        if self.scale == "weight":
            values = torch.linalg.svdvals(site.read("weight").detach().float())[:rank]
            return (values / scale).sqrt().mean().item()
        return 1 / scale if self.scale == "gd" else 1.0
