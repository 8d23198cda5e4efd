"""Dense heads over the features of a hierarchical backbone, one for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseHeads(nn.Module):
    """HRNet's last layers, of each task: stages side by side at the size of the largest, two 1 x 1 convolutions.

    Args:
        widths: channels of the stages.
        outputs: channels of a task's output, by its name.
    """

    def __init__(self, widths: Sequence[int], outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: _head(sum(widths), out) for task, out in outputs.items()})

    def forward(self, features: Mapping[str, Sequence[Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        """By task, (B, C, h, w) of each stage -> (B, out, *size)."""
        return {task: _resized(head(_fused(features[task])), size) for task, head in self.heads.items()}


def _head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 1))


def _fused(stages: Sequence[Tensor]) -> Tensor:
    """(B, C, h, w) of each stage -> (B, sum of C, h, w of the first)."""
    first, *others = stages
    return torch.cat([first, *(_resized(x, (first.shape[2], first.shape[3])) for x in others)], dim=1)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear")
