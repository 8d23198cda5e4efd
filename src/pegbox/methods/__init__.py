"""The registry: every file of this folder is a method, named after the file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from pegbox.core.method import Method

# other names for the same method, as other tools write them: name -> (method, settings that the name implies)
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bone": ("miss", {}),
    "disha": ("miss", {}),
    "rslora": ("lora", {"rslora": True}),
    "lora+": ("lora", {"b_rate": 16.0}),
    "loraplus": ("lora", {"b_rate": 16.0}),
    "full_ft": ("full", {}),
    "freeze": ("full", {}),
    "prompt": ("prompt_tuning", {}),
    "adapter": ("series", {}),
    "bottleneck": ("series", {}),
}

# settings as other tools write them: name -> ours
SETTING_ALIASES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "loraplus_lr_ratio": "b_rate",
    "target_modules": "targets",
    "lora_target": "targets",
    "lora_target_modules": "targets",
    "layers_to_transform": "layers",
    "exclude_modules": "exclude",
    "num_virtual_tokens": "tokens",
    "bone_r": "rank",
    "miss_dropout": "dropout",
    "mini_r": "mini",
    "bottleneck_size": "bottleneck",
}


def names() -> list[str]:
    """Every method, by listing the folder; imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: of a method, an alias of one, or the path of a file that holds one.

    Raises:
        SettingsError: no such method, with the nearest one.
    """
    if name.endswith(".py"):
        return load(Path(name))
    method = _plain(name)
    known = names()
    if method not in known:
        raise SettingsError(f"unknown method {name!r}{did_you_mean(method, [*known, *ALIASES])}")
    return _only_method(importlib.import_module(f"{__name__}.{method}"))


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and plain settings, with the names that other tools use accepted for both.

    Raises:
        SettingsError: an unknown method or setting, a wrong type or range, or one setting given under two names.
    """
    from pegbox.core.settings import build

    cls = get(name)
    _, implied = ALIASES.get(name.lower(), ("", {}))
    values = dict(implied)
    known = _fields(cls)
    for key, value in (settings or {}).items():
        ours = key if key in known else SETTING_ALIASES.get(key, key)
        if ours in values and ours not in implied:
            raise SettingsError(f"{name}.{ours} is given twice, as {key!r} too")
        values[ours] = value
    return build(cls, values, what=cls.name())


def load(path: Path) -> type[Method]:
    """The one method of a file outside this folder."""
    if not path.is_file():
        raise SettingsError(f"there is no method file {str(path)!r}")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return _only_method(module)


@functools.cache
def catalogue() -> dict[str, type[Method]]:
    """Every method's class, by name."""
    return {name: get(name) for name in names()}


def _plain(name: str) -> str:
    lower = name.lower()
    return ALIASES[lower][0] if lower in ALIASES else lower.replace("-", "_")


def _fields(cls: type[Method]) -> set[str]:
    import dataclasses

    return {f.name for f in dataclasses.fields(cls)}


def _only_method(module: Any) -> type[Method]:
    from pegbox.core.method import Method

    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise SettingsError(f"{module.__file__} must define one Method, it defines {len(found)}")
    return found[0]
