"""Matrices that are no module's own, and how one matrix is divided among roles: what the data files and modules say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pegbox.anatomy import tables
from pegbox.anatomy.paths import matches
from pegbox.core.parts import Rows, interleaved, parameter_paths

Found = Mapping[str, tuple[str, ...]]  # role -> paths


@dataclass(frozen=True)
class Cut:
    """How the rows of one matrix are divided.

    Attributes:
        roles: of the parts, in order.
        sizes: in what proportion; equal if empty.
        groups: the order repeats in so many groups of rows, one a head say; None: row by row.
    """

    roles: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    groups: int | None = 1

    def rows(self, rows: int) -> dict[str, Rows]:
        """The rows of each part, by the last word of its role, for a matrix of `rows` rows."""
        groups = rows // len(self.roles) if self.groups is None else self.groups
        return interleaved([role.rpartition(".")[2] for role in self.roles], rows, self.sizes, groups=groups)


@dataclass(frozen=True)
class Division:
    """The matrices of a model beyond its modules' own weights.

    Attributes:
        matrices: role to paths of parameters.
        cuts: path of a whole matrix, a module's or a parameter's, to how it is divided.
    """

    matrices: Found
    cuts: Mapping[str, Cut]

    def of_role(self, role: str) -> list[str]:
        """Paths of the parts that have a role."""
        return [f"{path}[{role.rpartition('.')[2]}]" for path, cut in self.cuts.items() if role in cut.roles]

    def under(self, path: str) -> Division:
        """The same, for a model that holds this one at `path`."""
        moved = {role: tuple(f"{path}.{p}" for p in paths) for role, paths in self.matrices.items()}
        return Division(moved, {f"{path}.{p}": cut for p, cut in self.cuts.items()})

    def __or__(self, other: Division) -> Division:
        roles = [*self.matrices, *(role for role in other.matrices if role not in self.matrices)]
        pairs = {role: (*self.matrices.get(role, ()), *other.matrices.get(role, ())) for role in roles}
        return Division(
            {role: tuple(dict.fromkeys(paths)) for role, paths in pairs.items()}, {**self.cuts, **other.cuts}
        )


NOTHING = Division({}, {})


def divide(model: nn.Module, patterns: tables.Patterns, splits: Mapping[str, tables.Split], found: Found) -> Division:
    """The parameters that have a role by `patterns`, and the cuts by role that `splits` names.

    Args:
        found: role to paths of the model's modules.
    """
    modules = dict(model.named_modules())
    paths = parameter_paths(modules)
    matrices = {role: tuple(p for p in paths if matches(p, given)) for role, given in patterns.items()}
    cuts = {
        path: cut
        for role, split in splits.items()
        if (cut := _cut(split, getattr(model, "config", None)))
        for path in (*found.get(role, ()), *matrices.get(role, ()))
    }
    named = Division({role: hits for role, hits in matrices.items() if hits}, cuts)
    return named | _of_torch(modules, found)


def _of_torch(modules: Mapping[str, nn.Module], found: Found) -> Division:
    """What torch's MultiheadAttention keeps."""
    matrices: dict[str, tuple[str, ...]] = {}
    cuts: dict[str, Cut] = {}
    for path, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        kind = "cross" if path in found.get("cross", ()) else "attn"
        inside = f"{path}." if path else ""
        matrices[f"{kind}.out"] = (*matrices.get(f"{kind}.out", ()), f"{inside}out_proj.weight")
        fused: Any = module.in_proj_weight  # None where keys or values have another width
        if fused is not None:
            cuts[f"{inside}in_proj_weight"] = Cut((f"{kind}.q", f"{kind}.k", f"{kind}.v"))
            if kind == "attn":
                matrices["attn.qkv"] = (*matrices.get("attn.qkv", ()), f"{inside}in_proj_weight")
            continue
        for letter in "qkv":
            matrices[f"{kind}.{letter}"] = (*matrices.get(f"{kind}.{letter}", ()), f"{inside}{letter}_proj_weight")
    return Division(matrices, cuts)


def _cut(split: tables.Split, config: Any) -> Cut | None:
    """None where the model's configuration lacks a number: then its parts have no names."""
    sizes = [_number(size, config) for size in split.sizes]
    given = 1 if split.layout == "stacked" else split.groups
    groups = None if given is None else _number(given, config)
    if None in sizes or (given is not None and groups is None):
        return None
    return Cut(split.parts, tuple(size for size in sizes if size is not None), groups)


def _number(given: int | str, config: Any) -> int | None:
    """A number, or what the model's configuration has under a word."""
    found = given if isinstance(given, int) else getattr(config, given, None)
    return found if isinstance(found, int) else None
