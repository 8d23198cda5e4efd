"""What is said of a target item that names nothing usable; the field's name is put before it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable

from pegbox.anatomy.roles import is_role, under
from pegbox.anatomy.scope import APART, Scope, stem_of
from pegbox.core.parts import parameter_paths

MOST = 8  # names listed in one message


def nothing(scope: Scope, item: str) -> str:
    """No module has this name: the nearest names, each with how many modules carry it."""
    if rows := scope.anatomy.division.of_role(item):
        return f"{item!r} is only some rows of a matrix here, {_only_weights(scope, rows)}"
    parameters = [path for path in parameter_paths(scope.modules) if path == item or path.endswith(f".{item}")]
    if parameters and not scope.parts:
        return f"{item!r} names parameters of other modules here, {_only_weights(scope, parameters)}"
    if parts := under(item, scope.anatomy.roles()):
        return (
            f"{item!r} is no one module of this model, and {scope.who} works on whole ones; target {', '.join(parts)}"
        )
    if is_role(item):
        return f"{item!r} is a role that this model lacks; it has: {', '.join(scope.anatomy.roles())}"
    return f"{item!r} match 0 of {len(scope.fitting)} {scope.noun()}; {_closest(scope, item)}"


def no_linears(scope: Scope) -> str:
    """The model has no linear that all-linear could mean: what it has instead, and what can be done."""
    held = Counter(type(m).__name__ for m in scope.modules.values() if any(True for _ in m.parameters(recurse=False)))
    apart = ", ".join(path for role in APART for path in scope.fit(scope.anatomy.roles().get(role, ())))
    lead = f"only {apart}, which all-linear leaves alone" if apart else "none"
    return (
        f"'all-linear': {scope.who} works on {', '.join(_workable(scope))}, and of those this model has {lead}; its "
        f"parameters are in: {_counted(held.most_common(MOST))}; name modules in targets (a role, a name, a path or a "
        "regular expression; anatomy.of(model).describe() shows the roles), or take a method that trains any module, "
        "such as full"
    )


def wrong_kind(scope: Scope, item: str, paths: list[str]) -> str:
    """The item names modules, but not such as the caller works on."""
    if all(map(scope.never_called, paths)):
        return (
            f"{item!r} names a layer whose weight torch's MultiheadAttention reads without ever calling the layer; "
            f"{scope.who} works on modules that are called, such as the attention itself; a method that maps weights "
            "works there"
        )
    if parameters := [path for path in paths if path not in scope.modules]:
        return f"{item!r} names parameters of other modules here, {_only_weights(scope, parameters)}"
    classes = " and ".join(_with_article(name) for name in sorted({type(scope.modules[p]).__name__ for p in paths}))
    within = Counter(path.rpartition(".")[2] for path in scope.beneath(paths))
    hint = f"; within: {_counted(within.most_common(MOST))}" if within else ""
    return f"{item!r} names {classes}; {scope.who} works on {', '.join(_workable(scope))}{hint}"


def _only_weights(scope: Scope, paths: list[str]) -> str:
    """Why a caller that works on whole modules cannot have a matrix that is none, and what it can."""
    holders = list(dict.fromkeys(map(stem_of, paths)))
    known = [role for role, found in scope.anatomy.roles().items() if set(found) & set(holders)]
    instead = f"; target {known[0]} instead" if known else ""
    return f"{paths[0]}, and {scope.who} works on whole modules{instead}; a method that maps weights works there"


def unread(item: str, paths: list[str]) -> str:
    """The item names only what nothing in the model depends on."""
    return (
        f"{item!r} names {paths[0]}, on whose outputs nothing in this model depends, so that no gradient would come "
        "there: the vision tower's states are taken before it (vision_feature_layer)"
    )


def outside_layers(scope: Scope, item: str, paths: Iterable[str]) -> str:
    """The item's modules all lie in other blocks, or in none."""
    depths = sorted({depth for depth in map(scope.anatomy.depth, paths) if depth is not None})
    where = f"in blocks {depths[0]} to {depths[-1]}" if depths else "outside the blocks"
    return f"{item!r} match nothing in the given layers; what they name lies {where}"


def bad_regex(item: str, error: re.error) -> str:
    at = "" if error.pos is None else f" at position {error.pos}"
    return f"{item!r} is not a role, a name or a valid regular expression: {error.msg}{at}"


def _workable(scope: Scope) -> list[str]:
    """The kinds, and what else in this model passes for one (Conv1D)."""
    present = (type(scope.modules[path]) for path in scope.fitting if path in scope.modules)
    return list(dict.fromkeys(kind.__name__ for kind in (*scope.kinds, *present)))


def _closest(scope: Scope, item: str) -> str:
    names = scope.leaf_names(item.count(".")) + _role_sizes(scope)
    near = difflib.get_close_matches(item, names, n=3, cutoff=0.6)
    if near:
        return f"closest: {_counted((name, names[name]) for name in near)}"
    return f"there are: {_counted(scope.leaf_names().most_common(MOST))}"


def _role_sizes(scope: Scope) -> Counter[str]:
    sizes = Counter({role: len(scope.fit(paths)) for role, paths in scope.anatomy.roles().items()})
    return +Counter({"all-linear": len(scope.linears())}) + sizes


def _counted(names: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in names) or "none"


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
