"""Full fine-tuning: every parameter of the base, or of the targets, trains in place.

    theta' = theta - lr * update        for all theta of the targets

The baseline of every paper here; there is none to cite.  It is the one method of this folder after which the base is
another model, so it shares a model with no other adapter and cannot be disabled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pegbox.core import Anatomy, Method, Traits, setting
from pegbox.core.method import split_names


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    targets: str | tuple[str, ...] = setting(r".*", "roles, leaf names, paths, all-linear, or a regex over paths")

    traits: ClassVar[Traits] = Traits(seams=("selection",), keeps_base=False, per_row=False)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return []

    def selects(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        find = functools.partial(anatomy.resolve, layers=self.layers, kinds=self.kinds, who=self.name())
        within = _prefixes(find(split_names(self.targets)))
        without = _prefixes(find(split_names(self.exclude)) if self.exclude else [])
        names = [name for name, _ in model.named_parameters()]
        return [name for name in names if name.startswith(within) and not name.startswith(without)]


def _prefixes(paths: list[str]) -> tuple[str, ...]:
    return tuple(f"{path}." if path else "" for path in paths)
