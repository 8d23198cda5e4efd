"""PEFT's configuration classes as settings of a method.

A field keeps PEFT's name, type, default and help.  What Pegbox says itself is left out (targets, layers, modules
trained whole), and what cannot be had through it is a field that takes no value and says why.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union

from pegbox.peft_bridge.kinds import WITHHELD, WITHHELD_VALUES, Facts

OURS = frozenset({  # said by Method itself, by the run, or by the file
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
})  # fmt: skip

# our words for a setting -> how PEFT's field of that meaning is found
ALIASES: dict[str, Callable[[str], bool]] = {
    "rank": lambda name: name in ("r", "init_r", "effective_rank"),
    "alpha": lambda name: name == "alpha" or name.endswith("_alpha"),
    "dropout": lambda name: name == "dropout" or name.endswith("_dropout"),
    "tokens": lambda name: name == "num_virtual_tokens",
}


def offered(config: type, facts: Facts) -> list[tuple[str, Any, Any]]:
    """(name, type, field) for `dataclasses.make_dataclass`, of all settings of a PEFT configuration."""
    hints = typing.get_type_hints(config)
    return [_field(f, hints[f.name], facts) for f in dataclasses.fields(config) if f.init and f.name not in OURS]


def aliases(config: type) -> dict[str, str]:
    """Our words for settings, where one field alone has that meaning."""
    known = [f.name for f in dataclasses.fields(config)]
    found = {ours: [name for name in known if means(name)] for ours, means in ALIASES.items()}
    return {ours: names[0] for ours, names in found.items() if names and ours not in known}


def _field(field: dataclasses.Field[Any], hint: Any, facts: Facts) -> tuple[str, Any, Any]:
    told = str(field.metadata.get("help", ""))
    plain = _plain(hint, WITHHELD_VALUES.get(field.name, ()))
    if field.name in WITHHELD or plain is None:
        why = WITHHELD.get(field.name, "it is no plain value")
        return field.name, type(None), dataclasses.field(default=None, metadata={"help": f"not here: {why}"})
    if field.name in facts.named:
        default = facts.named[field.name]
        return field.name, tuple[str, ...], dataclasses.field(default=default, metadata={"help": told})
    default = facts.defaults.get(field.name, as_setting(_default(field)))
    if default is None:
        plain = plain | None
    if isinstance(default, dict):
        return field.name, plain, dataclasses.field(default_factory=lambda: dict(default), metadata={"help": told})
    return field.name, plain, dataclasses.field(default=default, metadata={"help": told})


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _plain(hint: Any, without: Iterable[str]) -> Any:
    """A type of plain values for a field of PEFT's; None where there is none.

    An enumeration is its values, and text beside one, or beside true and false, is none but those.
    """
    if hint in (bool, int, float, str, type(None)):
        return hint
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _literal([member.value for member in hint], without)
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _literal(list(inside), without)
    if origin in (list, set, tuple) and inside:
        item = _plain(inside[0], without)
        return None if item is None else tuple[item, ...]  # type: ignore[valid-type]
    if hint is dict or origin is dict:
        return dict[str, Any]
    return _union(inside, without) if origin in (Union, types.UnionType) else None


def _union(members: Iterable[Any], without: Iterable[str]) -> Any:
    plain = [p for member in members if (p := _plain(member, without)) is not None]
    chosen = any(typing.get_origin(p) is Literal for p in plain) or bool in plain
    kept = [p for p in plain if not (p is str and chosen)]
    return Union[tuple(kept)] if [p for p in kept if p is not type(None)] else None  # noqa: UP007


def _literal(values: list[Any], without: Iterable[str]) -> Any:
    kept = tuple(v for v in values if v not in without)
    return Literal[kept] if kept else None


def as_setting(value: Any) -> Any:
    """A value of PEFT's as a plain one: lists and sets are tuples, members of an enumeration their values."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return tuple(as_setting(v) for v in value)
    if isinstance(value, set):
        return tuple(sorted(as_setting(v) for v in value))
    return value


def as_theirs(value: Any) -> Any:
    """A setting as PEFT takes it: tuples are lists."""
    return [as_theirs(v) for v in value] if isinstance(value, tuple) else value


def from_config(config: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Settings that an `adapter_config.json` of PEFT's gives, those that mean nothing left out."""
    return {name: as_setting(config[name]) for name in known if config.get(name) is not None}


def usual(config: type) -> dict[str, Any]:
    """PEFT's defaults, as plain values."""
    return {f.name: as_setting(_default(f)) for f in dataclasses.fields(config)}
