"""A module trained whole that leaves the base its own: a difference from each of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pegbox.core.graft import Graft
from pegbox.core.method import Anatomy
from pegbox.core.site import Base, Site


class DifferenceGraft(Graft):
    """Runs its module with p + d in the place of each of the module's own parameters p; d = 0 at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        own = [name for name, _ in site.module.named_parameters(recurse=False)]
        self.d = nn.ParameterDict({name: nn.Parameter(torch.zeros(site.read(name).shape)) for name in own})

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.with_values({name: base.read(name) + d for name, d in self.d.items()})(*args, **kwargs)


def norms(anatomy: Anatomy) -> list[str]:
    """Paths of a model's norms: those with a role, and layer norms without one."""
    known = {path for role, paths in anatomy.roles().items() if role.partition(".")[0] == "norm" for path in paths}
    named = anatomy.model.named_modules()
    return [path for path, m in named if path in known or (isinstance(m, nn.LayerNorm) and path not in anatomy.unread)]


def patches_and_positions(anatomy: Anatomy) -> list[str]:
    """Paths of the convolution that embeds patches, and of modules that hold positions."""
    roles, model = anatomy.roles(), anatomy.model
    patches = [path for path in roles.get("embed", ()) if isinstance(model.get_submodule(path), nn.Conv2d)]
    return [*patches, *roles.get("embed.position", ())]
