"""From what a user writes as targets to the paths of modules.

An item is read as the first of these that names a module of the right kind:

1. `all-linear` (or `all`): every linear outside the heads and the routers of experts;
2. a role (`attn.q`), or a prefix of roles (`attn`: every role beneath that the caller can work on);
3. a path, a leaf name or the tail of a path, whole components, as in PEFT (`q_proj`, `self_attn.q_proj`);
4. the same with names of rows behind it (`c_attn[q]`, `attn.qkv[q]`, `down_proj[3]`);
5. a regular expression that matches whole paths, if the item has a sign that only those have.

What is named as a whole, a block or `attn`, stands for the linears in it; embeddings and convolutions are named
themselves.  What nothing in the model depends on (see `unread`) is named by its whole path alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from pegbox.anatomy import refusals
from pegbox.anatomy.layers import layer_indices
from pegbox.anatomy.paths import within
from pegbox.anatomy.roles import ROLES, under
from pegbox.anatomy.scope import Scope, stem_of
from pegbox.core.errors import TargetError
from pegbox.core.layout import LINEAR, MATRIX, is_linear
from pegbox.core.parts import split_names

if TYPE_CHECKING:
    from pegbox.anatomy.anatomy import Anatomy

EVERYTHING = ("all-linear", "all")

REGEX_SIGNS = frozenset("\\*+?[](){}|^$")  # a dot alone also separates the parts of a path

Spec = str | Sequence[str]


def resolve(
    anatomy: Anatomy,
    model: nn.Module,
    targets: Spec,
    *,
    exclude: Spec = (),
    layers: str | None = None,
    kinds: tuple[type[nn.Module], ...] = LINEAR,
    parts: bool = False,
    who: str = "this method",
) -> list[str]:
    """The paths of the modules that `targets` names, in model order, and of matrices that are no module's own.

    Args:
        anatomy: the anatomy of `model`.
        model: the base.
        targets: one item or several (see the top of this file).
        exclude: items in the same form; a module that one names, or that lies within one, is left out.
        layers: blocks to keep, such as `0-5`, `0,3` or `-2` (the last two); what lies outside the blocks is left out.
        kinds: the classes that the caller works on, Conv1D being a Linear; `nn.Module` for any module, whole.
        parts: whether the caller works on matrices that are no module's own weight (see `pegbox.core.parts`).
        who: the caller's name, for messages.

    Raises:
        TargetError: an item names nothing, or only what is of another kind or outside `layers`; or nothing is left.
    """
    scope = Scope(anatomy, dict(model.named_modules()), kinds, who, parts)
    keep = layer_indices(layers, len(anatomy.blocks)) if layers is not None else None
    chosen = _each("targets", _items(targets), partial(_chosen, scope, keep))
    if not chosen:
        raise TargetError("targets is empty; name roles, leaf names, paths, a regular expression, or all-linear")
    dropped = _each("exclude", _items(exclude), partial(_excluded, scope))
    kept = _without(scope, chosen, dropped)
    if not kept:
        raise TargetError(f"exclude {exclude!r} leaves none of the {len(chosen)} {scope.noun()} that targets names")
    return kept


def _without(scope: Scope, chosen: set[str], dropped: set[str]) -> list[str]:
    """What is chosen and not dropped; of a matrix of which only some rows are dropped, its other rows."""
    kept = []
    for path in [*scope.fitting, *scope.pieces, *scope.weights]:
        if path not in chosen or path in dropped or _holder(path) in dropped:
            continue
        rows = [f"{path}[{name}]" for name in scope.names(stem_of(path))] if dropped & scope.pieces.keys() else []
        kept += [row for row in rows if row not in dropped] if dropped.intersection(rows) else [path]
    return kept


def _holder(path: str) -> str:
    """The matrix whose rows a path names, `c_attn` of `c_attn[q]`."""
    return path[: path.rindex("[")] if path.endswith("]") else path


def _items(spec: Spec) -> list[str]:
    return [item for item in ([spec] if isinstance(spec, str) else dict.fromkeys(spec)) if item]


def _each(field: str, items: Iterable[str], find: Callable[[str], list[str]]) -> set[str]:
    """The paths that `find` gives for all `items`; every item that fails is reported, not only the first."""
    found: set[str] = set()
    matched: list[str] = []
    failed: list[str] = []
    for item in items:
        try:
            found.update(find(item))
            matched.append(item)
        except TargetError as error:
            failed.append(f"{field} {error}")
    if failed:
        also = [f"the rest of {field} matched: {', '.join(matched)}"] if matched else []
        raise TargetError("\n".join(failed + also))
    return found


def _chosen(scope: Scope, keep: set[int] | None, item: str) -> list[str]:
    paths = _that_are_read(scope, item, _read(scope, item))
    inside = [path for path in paths if keep is None or scope.anatomy.depth(path) in keep]
    if not inside:
        raise TargetError(refusals.outside_layers(scope, item, paths))
    return inside


def _excluded(scope: Scope, item: str) -> list[str]:
    within = scope.beneath([*_with_role(scope, item), *_by_path(scope, item)])
    return within or _read(scope, item)


def _read(scope: Scope, item: str) -> list[str]:
    """The fitting paths of the first reading that has any."""
    unfit: list[str] = []
    for reading in (_everything, _by_role, _by_path, _by_rows, _by_regex):
        paths = reading(scope, item)
        fit = scope.fit(paths)
        if fit:
            return fit
        unfit = unfit or paths
    if item in EVERYTHING:
        raise TargetError(refusals.no_linears(scope))
    raise TargetError(refusals.wrong_kind(scope, item, unfit) if unfit else refusals.nothing(scope, item))


def _that_are_read(scope: Scope, item: str, paths: list[str]) -> list[str]:
    """Without what nothing depends on, unless the item is its path."""
    read = [path for path in paths if path == item or not within(path, scope.anatomy.unread)]
    if not read:
        raise TargetError(refusals.unread(item, paths))
    return read


def _everything(scope: Scope, item: str) -> list[str]:
    return scope.linears() if item in EVERYTHING else []


def _by_role(scope: Scope, item: str) -> list[str]:
    """The role's own modules if they fit, else those of the roles beneath it, else what lies within."""
    if experts := scope.left_out(item):
        return experts
    own = [*scope.anatomy.roles().get(item, ()), *scope.anatomy.matrices(item), *scope.anatomy.division.of_role(item)]
    if scope.fit(own) or (scope.whole_modules and item in ROLES):
        return own
    below = _with_role(scope, item)
    return _linears(scope, scope.fit(below)) or _linears(scope, scope.beneath(below)) or scope.fit(below) or below


def _linears(scope: Scope, paths: list[str]) -> list[str]:
    """Without embeddings and convolutions, where the caller works on them beside linears."""
    if nn.Linear not in scope.kinds:
        return paths
    return [path for path in paths if not isinstance(scope.modules.get(path), MATRIX) or is_linear(scope.modules[path])]


def _with_role(scope: Scope, item: str) -> list[str]:
    roles, matrices = scope.anatomy.roles(), scope.anatomy.division.matrices
    named = (item, *under(item, {**roles, **matrices}))
    return [path for role in named for path in (*roles.get(role, ()), *matrices.get(role, ()))]


def _by_path(scope: Scope, item: str) -> list[str]:
    named = (*scope.modules, *scope.parameters, *scope.weights)
    return [path for path in named if path == item or path.endswith(f".{item}")]


def _by_rows(scope: Scope, item: str) -> list[str]:
    stem, names = split_names(item)
    brackets = "".join(f"[{name}]" for name in names)
    if not names or item != stem + brackets:
        return []
    return [path + brackets for path in _by_role(scope, stem) or _by_path(scope, stem)]


def _by_regex(scope: Scope, item: str) -> list[str]:
    if not REGEX_SIGNS & set(item):
        return []
    try:
        pattern = re.compile(item)
    except re.error as error:
        raise TargetError(refusals.bad_regex(item, error)) from error
    whole = [path for path in (*scope.modules, *scope.parameters) if pattern.fullmatch(path)]
    return whole or [path for path in scope.pieces if pattern.fullmatch(path)]
