"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken, Ravfogel and Goldberg, 2021), arXiv:2106.10199.

    b' = b + d        for every bias b of the targets, d = 0 at the start

The paper trains b itself; a difference leaves the base as it is, so that several adapters can share it.  By default
all biases train, those of normalisations too.  A model without biases (Llama) has nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Anatomy, Method, Site, Traits, WeightGraft, setting
from pegbox.core.errors import TargetError


class BiasGraft(WeightGraft):
    maps = ("bias",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.zeros(site.read("bias").shape))

    def weight(self, w: Tensor) -> Tensor:
        return w + self.d


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    targets: str | tuple[str, ...] = setting(r".*", "roles, leaf names, paths, all-linear, or a regex over paths")

    traits: ClassVar[Traits] = Traits(seams=("weight",), card="peft-survey", linear=True, needs=("bias",))
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        modules = dict(model.named_modules())
        named = [path for path in super().sites(model, anatomy) if path in modules]  # a matrix alone has no bias
        paths = [path for path in named if isinstance(getattr(modules[path], "bias", None), Tensor)]
        if not paths:
            raise TargetError(f"bitfit trains biases, and {self.targets!r} names no module of this model that has one")
        return paths

    def graft(self, site: Site, shared: nn.Module | None) -> BiasGraft:
        return BiasGraft(site)

    def size(self, site: Site) -> int:
        return site.read("bias").numel()
