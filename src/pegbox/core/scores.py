"""How much a loss feels a low-rank update: sum |D * g| over a matrix, g the gradient of D = s B A, averaged over steps.

g = grad^T x is made where the site runs, and kept nowhere.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from pegbox.core.graft import LowRankGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.site import Base


class Scored(LowRankGraft):
    """A low-rank graft that can be asked.

    Attributes:
        watches: whether scores are made.
        score: sum |D * g| / sqrt(out * in) of this step, so far.
        mean: its average.
        spread: the average of its distance from `mean`.
    """

    watches = False
    score = mean = spread = 0.0

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = super().forward(base, x)
        if self.watches and y.requires_grad:
            y.register_hook(partial(self._see, x.detach()))
        return y

    @torch.no_grad()
    def _see(self, x: Tensor, grad: Tensor) -> None:
        """x (..., in), grad (..., out)."""
        down, up, scale = self.factors()
        update = scale * (up @ as_matrix(down, x.shape[-1], up))
        g = grad.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
        self.score += (update * g).abs().sum().item() / math.sqrt(update.numel())

    def average(self, beta: float) -> None:
        """Take the step's score into the averages."""
        self.mean = beta * self.mean + (1 - beta) * self.score
        self.spread = beta * self.spread + (1 - beta) * abs(self.score - self.mean)
        self.score = 0.0
