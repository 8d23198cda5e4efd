"""Which of the base's own parameters a method's targets name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pegbox.core.method import Anatomy, Method, split_names


def targeted(method: Method, model: nn.Module, anatomy: Anatomy, *, layers: str | None = None) -> list[str]:
    """Names of the parameters inside what `targets` names and `exclude` does not, in model order; tied ones once.

    What nothing in the model reads is left out, unless targets name its path.

    Args:
        layers: blocks to keep, as '0-5' or '-2'; what lies outside the blocks is then left out.

    Raises:
        TargetError: a target that names nothing.
    """

    def find(names: str | tuple[str, ...]) -> list[str]:
        return anatomy.resolve(split_names(names), layers=layers, kinds=(nn.Module,), who=method.name())

    names = inside((name for name, _ in model.named_parameters()), find(method.targets))
    items = split_names(method.targets)
    named = inside(names, (items,) if isinstance(items, str) else items)  # by the path of a module
    late = set(inside(names, anatomy.unread)).difference(named)
    dropped = set(inside(names, find(method.exclude))) if method.exclude else set()
    return [name for name in names if name not in dropped | late]


def inside(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The parameters, by name, that lie in one of the modules; '' is the whole model."""
    prefixes = tuple(f"{path}." if path else "" for path in paths)
    return [name for name in names if name.startswith(prefixes)]
