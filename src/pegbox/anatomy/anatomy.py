"""The roles in one model's structure, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from pegbox.anatomy import tables
from pegbox.anatomy.discover import discover
from pegbox.anatomy.divide import NOTHING, Division, divide
from pegbox.anatomy.heads import kv_heads
from pegbox.anatomy.paths import ancestry, matches, within
from pegbox.anatomy.roles import ROLES, TOWERS, is_role, under
from pegbox.anatomy.targets import resolve
from pegbox.anatomy.unread import unread
from pegbox.core.errors import TargetError, did_you_mean
from pegbox.core.layout import LINEAR
from pegbox.core.parts import Rows, named_rows

DISCOVERED = "discovered"


@dataclass(frozen=True)
class Anatomy:
    """Role to module paths, for one model.

    Args:
        model_type: the model's `config.model_type`, or None where it has none.
        source: the data file, such as `llama.toml`, or `discovered`.
        found: role to paths in model order; a role that the model lacks is absent.
        model: whose anatomy this is.
        division: matrices beyond the modules' own weights, and how matrices are divided.
        unread: modules without a role because nothing depends on what they give.
    """

    model_type: str | None
    source: str
    found: Mapping[str, tuple[str, ...]]
    model: nn.Module = field(repr=False, compare=False)
    division: Division = NOTHING
    unread: frozenset[str] = frozenset()

    def roles(self) -> dict[str, list[str]]:
        """Every role that this model has, to its module paths in model order."""
        return {role: list(self.found[role]) for role in ROLES if role in self.found}

    def role(self, name: str) -> list[str]:
        """Paths of the modules with role `name`; for a mere prefix (`norm`), of every role beneath it.

        Raises:
            TargetError: `name` is no role, or this model lacks it.
        """
        if name in self.found:
            return list(self.found[name])
        paths = [path for role in under(name, self.found) for path in self.found[role]]
        if not paths:
            raise TargetError(self._no_role(name))
        return paths

    def _no_role(self, name: str) -> str:
        if not is_role(name):
            return f"unknown role {name!r}{did_you_mean(name, ROLES)}"
        return f"{self._title()} has no module with the role {name!r}; it has: {', '.join(self.roles())}"

    def matrices(self, role: str) -> list[str]:
        """Paths of the parameters with a role that no module of their own keeps, experts' say."""
        return list(self.division.matrices.get(role, ()))

    def parts(self, path: str) -> dict[str, Rows]:
        """The named rows of a whole matrix, a module's or a parameter's, by name; of each expert's, where it has some.

        Raises:
            TargetError: there is no such matrix, or it cannot be divided as the data file says.
        """
        cut = self.division.cuts.get(path)
        return named_rows(*self._kept_at(path), cut.rows if cut else None)

    def _kept_at(self, path: str) -> tuple[nn.Module, str]:
        try:
            return self.model.get_submodule(path), "weight"
        except AttributeError:
            holder, _, leaf = path.rpartition(".")
            return self.model.get_submodule(holder), leaf

    @property
    def blocks(self) -> list[str]:
        """Paths of the blocks, in depth order; an encoder's blocks come before its decoder's."""
        return list(self.found.get("block", ()))

    @cached_property
    def _depths(self) -> dict[str, int]:
        return {path: depth for depth, path in enumerate(self.blocks)}

    def depth(self, path: str) -> int | None:
        """Which of `blocks` holds `path` (or is it), counted from 0; None for what lies outside them."""
        return next((self._depths[part] for part in ancestry(path) if part in self._depths), None)

    @property
    def head(self) -> str | None:
        """Path of the (first) head, if there is one."""
        return next(iter(self.found.get("head", ())), None)

    @property
    def embed(self) -> str | None:
        """Path of the (first) input embedding, if there is one."""
        return next(iter(self.found.get("embed", ())), None)

    def resolve(
        self,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        layers: str | None = None,
        kinds: tuple[type[nn.Module], ...] = LINEAR,
        parts: bool = False,
        who: str = "this method",
    ) -> list[str]:
        """The paths that target items name; see `targets.resolve`."""
        return resolve(self, self.model, targets, exclude=exclude, layers=layers, kinds=kinds, parts=parts, who=who)

    def kv_heads(self, path: str) -> int:
        """Heads of keys and values of the attention that holds the module at `path`; see `heads.kv_heads`."""
        return kv_heads(self.model, path)

    def describe(self) -> str:
        """A table of role, number of modules and path (`*` for the block), one role a line."""
        rows = [(role, str(len(paths)), self._shortened(paths)) for role, paths in self.roles().items()]
        rows = [("role", "modules", "path"), *rows]
        wide = max(len(role) for role, _, _ in rows)
        lines = [f"{role:<{wide}}  {count:>7}  {path}" for role, count, path in rows]
        return "\n".join([f"{self._title()} ({self.source}), {len(self.blocks)} blocks", *lines])

    def _title(self) -> str:
        return self.model_type or "this model"

    def _shortened(self, paths: list[str]) -> str:
        return ", ".join(dict.fromkeys(self._starred(path) for path in paths))

    def _starred(self, path: str) -> str:
        depth = self.depth(path)
        if depth is None:
            return path
        block = self.blocks[depth]
        return re.sub(r"[^.]+$", "*", block) + path.removeprefix(block)


def of(model: nn.Module) -> Anatomy:
    """The anatomy of `model`: from the data file that knows its type or class, else discovered.

    A model of a known type in which the file's `block` matches nothing (another layout of the same
    architecture) is discovered as well.  A tower (`vision`, `text`) brings the roles of its own type, all but a head;
    what of it is not read has none.
    """
    # Any nn.Module is welcome, so a missing config is an answer, not an error.
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    by_type, by_class = tables.by_model_type(), tables.by_class()
    table = by_type.get(model_type) if isinstance(model_type, str) else by_class.get(type(model).__name__)
    found = _with_towers(model, _matched(model, table.roles)) if table else {}
    if table and "block" in found:
        source, division = table.source, divide(model, table.roles, table.splits, found) | _of_towers(model, found)
    else:
        found = discover(model)
        source, division = DISCOVERED, divide(model, tables.generic()["leaf"], {}, found)
    late = unread(model, found)
    read = {role: tuple(path for path in paths if not within(path, late)) for role, paths in found.items()}
    return Anatomy(model_type, source, {role: paths for role, paths in read.items() if paths}, model, division, late)


def _matched(model: nn.Module, roles: tables.Patterns) -> dict[str, tuple[str, ...]]:
    paths = [path for path, _ in model.named_modules()]
    found = {role: tuple(p for p in paths if matches(p, patterns)) for role, patterns in roles.items()}
    in_turn = [p for pattern in roles.get("block", ()) for p in found["block"] if matches(p, [pattern])]
    found["block"] = tuple(dict.fromkeys(in_turn))  # a U-Net registers its middle block last
    return {role: hits for role, hits in found.items() if hits}


def _with_towers(model: nn.Module, found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """`found`, and what the anatomies of the towers that it names add, in model order."""
    towers = [(role, path) for role in TOWERS for path in found.get(role, ())]
    if not towers:
        return found
    joined = {role: set(paths) for role, paths in found.items()}
    for tower, path in towers:
        inner = of(model.get_submodule(path)).found
        for role in inner.keys() - {"head"}:
            joined.setdefault(role, set()).update(f"{path}.{p}" for p in inner[role])
        joined[f"{tower}.block"] = {f"{path}.{p}" for p in inner.get("block", ())}
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    return {role: tuple(sorted(paths, key=order.__getitem__)) for role, paths in joined.items() if paths}


def _of_towers(model: nn.Module, found: dict[str, tuple[str, ...]]) -> Division:
    """What the towers' own anatomies divide."""
    whole = NOTHING
    for path in (path for role in TOWERS for path in found.get(role, ())):
        whole = whole | of(model.get_submodule(path)).division.under(path)
    return whole
