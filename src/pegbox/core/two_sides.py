"""Methods that change the outputs of some modules and the inputs of others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pegbox.core.method import Anatomy, Method, split_names
from pegbox.core.settings import setting
from pegbox.core.site import Site


@dataclass(frozen=True, kw_only=True)
class TwoSided(Method):
    """`targets` name the modules whose outputs change, `inputs` those whose inputs do; what both name is an input."""

    inputs: str | tuple[str, ...] = setting((), "modules whose inputs change instead, written the same way")

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        before = self._before(anatomy)
        after = super().sites(model, anatomy) if self.targets or not before else []
        return [*before, *(path for path in after if path not in set(before))]

    def at_input(self, site: Site) -> bool:
        """Whether it is the input that changes at a site."""
        return site.path in self._before(site.context.anatomy)

    def _before(self, anatomy: Anatomy) -> list[str]:
        if not self.inputs:
            return []
        return anatomy.resolve(
            split_names(self.inputs),
            exclude=split_names(self.exclude),
            layers=self.layers,
            kinds=self.kinds,
            parts="weight" in self.traits.seams,
            who=f"{self.name()}.inputs",
        )
