"""The data files of this folder, read when first needed.

    model_types = ["qwen2", "qwen3"]      # config.model_type of the architectures with this anatomy
    classes = ["UNet2DModel"]             # or the class, where the config has no model_type, as in diffusers

    [roles]                               # role = pattern, or list of patterns (see `paths.matches`)
    block = "layers.*"
    "attn.q" = "self_attn.q_proj"

    [only.qwen3]                          # what one of them has besides
    "norm.q" = "self_attn.q_norm"

    [parts]                               # matrices that hold several roles, by rows; [only.qwen3.parts] as well
    "attn.qkv" = { parts = ["attn.q", "attn.k", "attn.v"], layout = "stacked" }

A pattern of a role may name a parameter too, where experts keep their matrices in one (`experts.down_proj`).  Parts:

    layout   `stacked`: one part's rows after another's; `interleaved`: so in each of several groups of rows
    sizes    the proportion of the parts' rows, as numbers or as words of the configuration (`num_key_value_heads`);
             equal if not given
    groups   how many groups, a number or a word of the configuration (`num_attention_heads`); if not given, the parts
             take turns row by row

The patterns of `block` come in the order in which the blocks run.

`generic.toml` has no model types: it is the table of names for `discover`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

GENERIC = "generic.toml"

Patterns = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Split:
    """One line of `[parts]`: how a matrix is divided among roles."""

    parts: tuple[str, ...]
    layout: Literal["stacked", "interleaved"] = "stacked"
    sizes: tuple[int | str, ...] = ()
    groups: int | str | None = None


@dataclass(frozen=True)
class Table:
    """The anatomy of one model type or class: role to patterns, how matrices are divided, and the file that says so."""

    source: str
    roles: Patterns
    splits: Mapping[str, Split]


@cache
def by_model_type() -> Mapping[str, Table]:
    """Every model type that a data file describes."""
    return _by("model_types")


@cache
def by_class() -> Mapping[str, Table]:
    """Every class of models without a model type that a data file describes."""
    return _by("classes")


def _by(key: str) -> dict[str, Table]:
    folder = resources.files(__package__)
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml") and f.name != GENERIC)
    return {kind: table for name in names for kind, table in _tables(name, key, _read(name)).items()}


@cache
def generic() -> Mapping[str, Patterns]:
    """The sections of `generic.toml`: `whole`, `leaf`, `norm` and `head`, each role to patterns in order."""
    return {section: _patterns(roles) for section, roles in _read(GENERIC).items()}


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _tables(name: str, key: str, data: dict[str, Any]) -> dict[str, Table]:
    own = data.get("only", {})
    return {kind: _table(name, data, own.get(kind, {})) for kind in data.get(key, ())}


def _table(name: str, data: dict[str, Any], own: dict[str, Any]) -> Table:
    roles = {role: patterns for role, patterns in own.items() if role != "parts"}
    return Table(name, _joined(data["roles"], roles), _splits(data.get("parts", {}) | own.get("parts", {})))


def _splits(lines: dict[str, Any]) -> dict[str, Split]:
    return {role: Split(**_tupled(line)) for role, line in lines.items()}


def _tupled(line: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}


def _joined(roles: dict[str, Any], more: dict[str, Any]) -> Patterns:
    first, second = _patterns(roles), _patterns(more)
    return {role: first.get(role, ()) + second.get(role, ()) for role in first | second}


def _patterns(roles: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {role: (given,) if isinstance(given, str) else tuple(given) for role, given in roles.items()}
