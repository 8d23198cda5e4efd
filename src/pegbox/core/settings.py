"""A dataclass as a schema: typed, bounded, documented fields, filled from Python, YAML or the command line.

One declaration serves all of them:

    rank: int = setting(16, "columns of B and rows of A", at_least=1)

A constructor only stores; `build` coerces and checks, and `schema` renders the same facts as JSON Schema.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pegbox.core.errors import SettingsError, did_you_mean

T = TypeVar("T")

# bound: (what a message says, what a value must satisfy, the JSON Schema keyword)
_BOUNDS = {
    "at_least": ("at least", lambda v, b: v >= b, "minimum"),
    "above": ("above", lambda v, b: v > b, "exclusiveMinimum"),
    "at_most": ("at most", lambda v, b: v <= b, "maximum"),
    "below": ("below", lambda v, b: v < b, "exclusiveMaximum"),
}


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its one-line meaning and, for numbers and lists of them, bounds."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help} | {k: v for k, v in bounds.items() if v is not None}
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], values: Mapping[str, Any], *, what: str | None = None) -> T:
    """An instance of the dataclass `cls`, from plain values.

    Args:
        values: settings by name; strings are read as the field's type, lists as tuples.
        what: how a message calls the thing, `lora` say; the class's name if not given.

    Raises:
        SettingsError: an unknown name (with the nearest one), a wrong type, a number out of bounds.
    """
    what = what or cls.__name__
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise SettingsError(f"{what} has no setting {name!r}{did_you_mean(name, fields)}")
    coerced = {name: coerce(what, name, _hints(cls)[name], value) for name, value in values.items()}
    instance = cls(**coerced)
    check(instance, what=what)
    return instance


def check(instance: Any, *, what: str | None = None) -> None:
    """Raise SettingsError if a field of a dataclass instance has a wrong type or is out of its bounds."""
    what = what or type(instance).__name__
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        coerce(what, field.name, _hints(type(instance))[field.name], value)
        _check_bounds(what, field, value)


def schema(cls: type) -> dict[str, Any]:
    """JSON Schema of the dataclass `cls`: types, defaults, bounds and help."""
    properties = {}
    required = []
    for field in dataclasses.fields(cls):
        spec = TypeAdapter(_hints(cls)[field.name]).json_schema()
        plain = default(field)
        if plain is dataclasses.MISSING:
            required.append(field.name)
        elif not dataclasses.is_dataclass(plain):
            spec["default"] = list(plain) if isinstance(plain, tuple) else plain
        if "help" in field.metadata:
            spec["description"] = field.metadata["help"]
        for bound, (_, _, keyword) in _BOUNDS.items():
            if bound in field.metadata:
                spec[keyword] = field.metadata[bound]
        properties[field.name] = spec
    out: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return out | ({"required": required} if required else {})


def default(field: dataclasses.Field[Any]) -> Any:
    """What a field has if nothing is given; `dataclasses.MISSING` if something must be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _hints(cls: type) -> dict[str, Any]:
    return _read_hints(cls)


@functools.cache
def _read_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def coerce(what: str, name: str, hint: Any, value: Any) -> Any:
    """A plain value as a type, `1` as a float; SettingsError, which calls it `what.name`, where it is none."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, bool) and hint in (int, float):
        raise SettingsError(f"{what}.{name} must be {_spell(hint)}, got {value!r}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise SettingsError(f"{what}.{name} must be {_spell(hint)}, got {value!r}") from error


def _check_bounds(what: str, field: dataclasses.Field[Any], value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    for bound, (words, holds, _) in _BOUNDS.items():
        limit = field.metadata.get(bound)
        if limit is not None and not all(holds(number, limit) for number in _numbers(value)):
            raise SettingsError(f"{what}.{field.name} must be {words} {limit}, got {value!r}")


def _numbers(value: Any) -> Iterable[float]:
    """Those that a bound is about: the value, or each of a list."""
    return value if isinstance(value, tuple) else (value,)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
        Any: "a value",
    }
    if hint in plain:
        return plain[hint]
    if args := [a for a in typing.get_args(hint) if a is not Ellipsis]:
        words = " or ".join(dict.fromkeys(_spell(a) for a in args))
        if typing.get_origin(hint) is Mapping:
            return f"names with {_spell(args[-1])} each"
        return f"a list of {words}" if typing.get_origin(hint) is tuple else words
    return str(getattr(hint, "__name__", hint))
