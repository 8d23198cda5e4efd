"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning (Pan et al., 2024),
arXiv:2403.17919.

    at steps t = k K, k = 0, 1, ...:   S_k = g of the N blocks, uniform without replacement
    until the next:                    AdamW on {embeddings, norm after the blocks, head} and the blocks of S_k

g is `active`, K is `period`.  A frozen block has no gradient, no update and no decay.  What the optimizer holds of a
block is freed when the block leaves, so a block that comes back starts with Adam's moments at zero and its bias
correction at 1, and the memory is that of g blocks: the authors' callback keeps it all, and grows to that of full
fine-tuning.  S_k is drawn from the seed and k alone, so a resumed run has the same blocks.

Before the first step everything counts as training, so that an optimizer made then holds every block; `pegbox.Trainer`
and `pegbox.Callback` choose from there on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pegbox.core import Anatomy, Method, Traits, Tuned, setting
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.selection import inside, targeted


@dataclass(frozen=True, kw_only=True)
class LISA(Method):
    targets: str | tuple[str, ...] = setting(r".*", "roles, leaf names, paths, all-linear, or a regex over paths")
    layers: str | None = setting(None, "blocks to draw from, as '0-5,8' or '-2' for the last two; all if none")
    active: int = setting(2, "blocks that train at a time", at_least=1)
    period: int = setting(20, "optimizer steps until other blocks are drawn", at_least=1)
    draw_seed: int = setting(0, "of the draws")

    traits: ClassVar[Traits] = Traits(
        seams=("selection", "time"), card="lisa", keeps_base=False, per_row=False, in_turn=True, needs=("blocks",)
    )
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return []

    def selects(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        names = targeted(self, model, anatomy)
        blocks = self._blocks(anatomy)
        if self.active > len(blocks):
            raise SettingsError(f"lisa.active must be 1..{len(blocks)}, the blocks to draw from, got {self.active}")
        if not inside(names, blocks):
            raise TargetError(f"lisa trains blocks in turn, and {self.targets!r} names nothing inside them")
        never = set(inside(names, anatomy.blocks)) - set(inside(names, blocks))
        return [name for name in names if name not in never]

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        names = tuned.adapter().selected
        blocks = self._blocks(tuned.anatomy)
        resting = set(inside(names, set(blocks) - set(self.drawn(blocks, step))))
        tuned.select(f"base.{name}" for name in names if name not in resting)

    def drawn(self, blocks: list[str], step: int) -> list[str]:
        """The blocks that train at an optimizer step (from 0)."""
        return random.Random(f"{self.draw_seed}/{step // self.period}").sample(blocks, self.active)

    def _blocks(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.blocks:
            raise TargetError("lisa trains blocks in turn, and this model has none that its anatomy knows")
        if self.layers is None:
            return anatomy.blocks
        inside_layers = set(anatomy.resolve(r".*", layers=self.layers, kinds=self.kinds, who=self.name()))
        return [path for path in anatomy.blocks if path in inside_layers]
