"""The anatomy of a model that no data file describes, from its structure and the names of its modules.

Blocks are the members of every outermost list (ModuleList, Sequential) of modules of one class.  Norms are
the modules whose parameters are all 1-D.  The rest goes by name, in the order of `generic.toml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal

from torch import nn

from pegbox.anatomy import tables
from pegbox.anatomy.paths import matches, within
from pegbox.anatomy.roles import TOWERS

Modules = Mapping[str, nn.Module]
Place = Literal["before", "inside", "after", "alone"]  # of a module to the blocks; alone: there are none

NORM_BY_PLACE: Mapping[Place, str] = {
    "before": "norm.embed",
    "inside": "norm.block",
    "after": "norm.final",
    "alone": "norm.block",
}
BLOCK_PARTS = ("attn", "cross", "mlp")


def discover(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Role to paths in model order; a role for which nothing was found is absent."""
    modules = {path: module for path, module in model.named_modules() if path}
    blocks = _blocks(modules)
    places = _places(modules, blocks)
    head = _head(model, modules, places)
    found: dict[str, list[str]] = {"block": blocks, "head": head}
    for path, module in modules.items():
        role = _role(path, module, places[path])
        if role and not within(path, [*head, *found.get(role, ())]):
            found.setdefault(role, []).append(path)
    found["embed"] = _running(found.get("embed", []), modules)
    found |= _stacks_of_two(blocks) | _blocks_of_towers(blocks, found)
    return {role: tuple(paths) for role, paths in found.items() if paths}


def _blocks(modules: Modules) -> list[str]:
    """Members of the outermost lists of blocks; failing those, of lists of differing or of plain layers."""
    for is_list in (_repeats, _mixes, _stacks):
        lists = _outermost(path for path, module in modules.items() if is_list(module))
        if lists:
            return [f"{path}.{name}" for path in lists for name, _ in modules[path].named_children()]
    return []


def _repeats(module: nn.Module) -> bool:
    return _is_list(module) and _one_class(module) and _composite(module)


def _mixes(module: nn.Module) -> bool:  # such as attention blocks and state-space blocks in turn
    return isinstance(module, nn.ModuleList) and _is_list(module) and _composite(module)


def _stacks(module: nn.Module) -> bool:
    return _is_list(module) and _one_class(module) and all(_holds_weights(m) for m in module.children())


def _is_list(module: nn.Module) -> bool:
    least = 1 if isinstance(module, nn.ModuleList) else 2
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= least


def _one_class(module: nn.Module) -> bool:
    return len({type(child) for child in module.children()}) == 1


def _composite(module: nn.Module) -> bool:
    return all(_some(m.children()) and _some(m.parameters()) for m in module.children())


def _places(modules: Modules, blocks: Sequence[str]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    roots, passed = set(blocks), False
    for path in modules:
        inside = within(path, roots)
        passed = passed or inside
        places[path] = "alone" if not blocks else "inside" if inside else "after" if passed else "before"
    return places


def _head(model: nn.Module, modules: Modules, places: Mapping[str, Place]) -> list[str]:
    """What the model says its head is; failing that, what is named like one; else the last Linear after the blocks."""
    output = _output_embeddings(model)
    said = [path for path, module in modules.items() if module is output]
    outside = [path for path, place in places.items() if place != "inside" and _some(modules[path].parameters())]
    named = [path for path in outside if matches(path, tables.generic()["head"]["head"])]
    pooler = [path for path in outside if matches(path, tables.generic()["whole"]["pooler"])]
    linears = [path for path in outside if isinstance(modules[path], nn.Linear) and places[path] != "before"]
    last = [path for path in linears if not within(path, pooler)][-1:]
    return _outermost(said or named or last)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)  # transformers has it
    try:
        return getter() if getter else None
    except NotImplementedError:
        return None


def _role(path: str, module: nn.Module, place: Place) -> str | None:
    if _is_norm(module):
        return _named("outer_norm" if place in ("before", "after") else "norm", path) or NORM_BY_PLACE[place]
    role = (_named("leaf", path) if _holds_weights(module) else None) or _named("whole", path)
    if role and _belongs(role, place):
        return role
    return "embed" if isinstance(module, nn.Embedding) and place != "inside" else None


def _named(section: str, path: str) -> str | None:
    return next((role for role, names in tables.generic()[section].items() if matches(path, names)), None)


def _belongs(role: str, place: Place) -> bool:
    """Parts of a block lie inside the blocks, the others outside; a relative position bias may lie in a block."""
    if place == "alone" or role == "embed.position":
        return True
    return (role.split(".")[0] in BLOCK_PARTS) == (place == "inside")


def _running(embeds: Sequence[str], modules: Modules) -> list[str]:
    """Without an Embedding that only keeps the matrix for deeper ones tied to it, as T5's and BART's `shared` does."""
    deepest: dict[int, int] = {}
    for path in embeds:
        key = _matrix(modules[path])
        deepest[key] = max(deepest.get(key, 0), path.count("."))
    return [path for path in embeds if path.count(".") == deepest[_matrix(modules[path])]]


def _matrix(module: nn.Module) -> int:
    return id(next(module.parameters(), module))


def _stacks_of_two(blocks: Sequence[str]) -> dict[str, list[str]]:
    """The blocks of the encoder and of the decoder, in a model that names both."""
    stacks = {f"{side}.block": [path for path in blocks if side in path.split(".")] for side in ("encoder", "decoder")}
    return stacks if all(stacks.values()) else {}


def _blocks_of_towers(blocks: Sequence[str], found: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {f"{tower}.block": [path for path in blocks if within(path, found.get(tower, ()))] for tower in TOWERS}


def _is_norm(module: nn.Module) -> bool:
    params = list(module.parameters())
    return not _some(module.children()) and bool(params) and all(p.dim() == 1 for p in params)


def _holds_weights(module: nn.Module) -> bool:
    return _some(chain(module.parameters(recurse=False), module.buffers(recurse=False)))


def _some(things: Iterable[object]) -> bool:  # any() would ask a tensor for its truth
    return next(iter(things), None) is not None


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in paths:  # a parent comes before its children
        if not within(path, kept):
            kept.append(path)
    return kept
