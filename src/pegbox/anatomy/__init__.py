"""What the parts of a model are for: roles such as `attn.q`, as data, one small file per architecture.

    anatomy = of(model)
    anatomy.role("attn.q")                               # paths of modules
    anatomy.resolve("attn", layers="0-5")                # the matrices of attention in the first six blocks

To add an architecture, add one TOML file to this folder; see `tables`.
"""

from __future__ import annotations

from pegbox.anatomy.anatomy import Anatomy, of
from pegbox.anatomy.roles import ROLES
from pegbox.anatomy.targets import resolve

__all__ = ["ROLES", "Anatomy", "of", "resolve"]
