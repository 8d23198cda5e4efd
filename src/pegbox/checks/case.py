"""A case: a method with settings that fit tiny models, and the families it is checked on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pegbox import methods
from pegbox.checks.models import FAMILIES, Family
from pegbox.checks.when import has_its_needs
from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.core.method import Method
from pegbox.core.settings import build, default

SMALL = 4  # whole numbers above this are set to it
SCALE = 6.0  # and other numbers to this, so that alpha / rank is not 1


@dataclass(frozen=True)
class Case:
    """One line of a list of cases.

    Args:
        method: a name of the registry, the path of a method file, a class, or a method with its settings.
        settings: for a method that comes without; what is left out is made to fit tiny models.
        families: names; the first that the method can work on is where most checks run.
    """

    method: str | type[Method] | Method
    settings: Mapping[str, Any] = field(default_factory=dict)
    families: Sequence[str | Family] = tuple(FAMILIES)

    def built(self) -> Method:
        """The method with its settings."""
        if isinstance(self.method, Method):
            return self.method
        cls = self.method if inspect.isclass(self.method) else methods.get(str(self.method))
        return build(cls, small(cls) | dict(self.settings), what=cls.name())

    def all_families(self) -> list[Family]:
        """The families, the one where most checks run first."""
        found = [f if isinstance(f, Family) else family(f) for f in self.families]
        method = self.built()
        return sorted(found, key=lambda f: has_its_needs(method, f) is not None)

    def title(self) -> str:
        """The method and the settings that differ from its defaults."""
        method = self.built()
        given = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        plain = {f.name: default(f) for f in dataclasses.fields(method)}
        changed = [f"{name}={value!r}" for name, value in given.items() if value != plain[name]]
        return f"{method.name()}({', '.join(changed)})"


def family(name: str) -> Family:
    if name not in FAMILIES:
        raise SettingsError(f"there is no family of models {name!r}{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def small(cls: type[Method]) -> dict[str, Any]:
    """Numbers that are too large for a model of width 32, made small, and what the method says of such models."""
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    large = {k: v for k, v in fields.items() if isinstance(v, (int, float)) and v > SMALL}
    return {k: SMALL if isinstance(v, int) else SCALE for k, v in large.items()} | dict(cls.small)


def smallest(method: Method) -> Method:
    """Every whole-number setting at its lower bound: rank 1."""
    bounds = {f.name: f.metadata["at_least"] for f in dataclasses.fields(method) if "at_least" in f.metadata}
    given = {name: bound for name, bound in bounds.items() if _whole(getattr(method, name))}
    return dataclasses.replace(method, **given)


def suited(method: Method, family: Family) -> Method:
    """A method as this family can take it: other targets where it has no roles, least settings for odd sizes."""
    if family.name == "odd":
        method = smallest(method)
    if family.targets and nn.Linear in method.kinds:
        matrices = family.matrices if nn.Embedding in method.kinds else None
        method = dataclasses.replace(method, targets=matrices or family.targets)
    return method


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
