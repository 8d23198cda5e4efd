"""Full fine-tuning: every parameter of the base, or of the targets, trains in place.

    theta' = theta - lr * update        for all theta of the targets

The baseline of every paper here; there is none to cite.  It is the one method of this folder after which the base is
another model, so it shares a model with no other adapter and cannot be disabled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pegbox.core import Anatomy, Method, Traits, setting
from pegbox.core.selection import targeted


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    targets: str | tuple[str, ...] = setting(r".*", "roles, leaf names, paths, all-linear, or a regex over paths")

    traits: ClassVar[Traits] = Traits(seams=("selection",), keeps_base=False, per_row=False)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return []

    def selects(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return targeted(self, model, anatomy, layers=self.layers)
