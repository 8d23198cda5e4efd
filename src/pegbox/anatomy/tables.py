"""The data files of this folder, read when first needed.

    model_types = ["qwen2", "qwen3"]      # config.model_type of the architectures with this anatomy

    [roles]                               # role = pattern, or list of patterns (see `paths.matches`)
    block = "layers.*"
    "attn.q" = "self_attn.q_proj"

    [only.qwen3]                          # what one of the model types has besides
    "norm.q" = "self_attn.q_norm"

`generic.toml` has no model types: it is the table of names for `discover`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

GENERIC = "generic.toml"

Patterns = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """The anatomy of one model type: role to patterns, and the file that says so."""

    source: str
    roles: Patterns


@cache
def by_model_type() -> Mapping[str, Table]:
    """Every model type that a data file describes."""
    folder = resources.files(__package__)
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml") and f.name != GENERIC)
    return {kind: table for name in names for kind, table in _tables(name, _read(name)).items()}


@cache
def generic() -> Mapping[str, Patterns]:
    """The sections of `generic.toml`: `whole`, `leaf`, `norm` and `head`, each role to patterns in order."""
    return {section: _patterns(roles) for section, roles in _read(GENERIC).items()}


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _tables(name: str, data: dict[str, Any]) -> dict[str, Table]:
    own = data.get("only", {})
    return {kind: Table(name, _joined(data["roles"], own.get(kind, {}))) for kind in data["model_types"]}


def _joined(roles: dict[str, Any], more: dict[str, Any]) -> Patterns:
    first, second = _patterns(roles), _patterns(more)
    return {role: first.get(role, ()) + second.get(role, ()) for role in first | second}


def _patterns(roles: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {role: (given,) if isinstance(given, str) else tuple(given) for role, given in roles.items()}
