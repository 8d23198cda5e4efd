"""The registry: every file of this folder is a method, named after the file.

So is every file of the folders that PEGBOX_METHODS names, a variable of the environment: methods of one's own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox import peft_bridge
from pegbox.core.errors import PegboxError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from pegbox.core.files import AdapterFile
    from pegbox.core.method import Method

__path__.extend(folder for folder in os.environ.get("PEGBOX_METHODS", "").split(os.pathsep) if folder)

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
    "lst": ("ladder", {}),
    "ladder_side_tuning": ("ladder", {}),
    "sc_tuner": ("scedit", {}),
    "scetuning": ("scedit", {}),
    "prefix": ("prefix_tuning", {}),
    "ptuning": ("p_tuning", {}),
    "adapter": ("series", {}),
    "bottleneck": ("series", {}),
    "houlsby": ("series", {"preset": "houlsby"}),
    "double_seq_bn": ("series", {"preset": "houlsby"}),
    "pfeiffer": ("series", {"preset": "pfeiffer"}),
    "seq_bn": ("series", {"preset": "pfeiffer"}),
    "par_bn": ("parallel", {}),
    "compacter++": ("compacter", {"preset": "compacter++"}),
    "compacterpp": ("compacter", {"preset": "compacter++"}),
    "phm": ("compacter", {"preset": "phm-adapter"}),
    "pissa": ("lora", {"start": "pissa"}),
    "olora": ("lora", {"start": "olora"}),
    "slora": ("nlora", {"preset": "slora"}),
    "inttune": ("nlora", {"preset": "inttune"}),
    "poly": ("mhr", {"preset": "poly"}),
    "polytropon": ("mhr", {"preset": "poly"}),
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
    "prefix_projection": "projection",
    "encoder_hidden_size": "hidden",
    "bone_r": "rank",
    "miss_dropout": "dropout",
    "mini_r": "mini",
    "bottleneck_size": "bottleneck",
    "init_lora_weights": "start",
    "init_weights": "start",
    "rank_pattern": "ranks",
    "alpha_pattern": "alphas",
    "non_linearity": "activation",
    "phm_dim": "division",
    "reduction_factor": "reduction",
    "lisa_activated_layers": "active",
    "lisa_interval_steps": "period",
}


def names() -> list[str]:
    """Every method, by listing the folder; imports none of them."""
    return sorted({m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")})


def get(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: of a method, an alias of one, `peft:NAME` for one of HF PEFT's own, or the path of a file that holds one.

    Raises:
        SettingsError: no such method, with the nearest one.
    """
    if name.endswith(".py"):
        return load(Path(name))
    if peft_bridge.is_bridged(name):
        return peft_bridge.get(name)
    method = _plain(name)
    known = names()
    if method not in known:
        raise SettingsError(f"unknown method {name!r}{did_you_mean(method, [*known, *ALIASES])}")
    with _told(method):
        return _only_method(importlib.import_module(f"{__name__}.{method}"))


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and plain settings, with the names that other tools use accepted for both.

    Args:
        name: as for `get`; an alias may imply settings.
        settings: by name; `preset` is a name among the method's presets, whose settings others override.

    Raises:
        SettingsError: an unknown method, preset or setting, a wrong type or range, or one setting given under two
            names.
    """
    from pegbox.core.settings import build

    cls = get(name)
    _, implied = ALIASES.get(name.lower(), ("", {}))
    given = _in_our_names(cls, settings or {})
    named = given.pop("preset", implied.get("preset"))
    whole = dict(cls.preset(named).settings) if named is not None else {}
    values = whole | {k: v for k, v in implied.items() if k != "preset"} | given
    return build(cls, values, what=cls.name())


def _in_our_names(cls: type[Method], settings: Mapping[str, Any]) -> dict[str, Any]:
    known, values = _fields(cls), {}
    for key, value in settings.items():
        ours = key if key in known else cls.aliases.get(key, SETTING_ALIASES.get(key, key))
        if ours in values:
            raise SettingsError(f"{cls.name()}.{ours} is given twice, as {key!r} too")
        values[ours] = value
    return values


def load(path: Path) -> type[Method]:
    """The one method of a file outside this folder.

    Raises:
        SettingsError: no such file, one that Python cannot run, or not one method in it.
    """
    if not path.is_file():
        raise SettingsError(f"there is no method file {str(path)!r}")
    name = f"method_file.{path.stem}"  # never that of an installed module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _told(str(path)):
        spec.loader.exec_module(module)
    return _only_method(module)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell what goes wrong in a method's file, whatever its author wrote, as a SettingsError."""
    try:
        yield
    except PegboxError:
        raise
    except Exception as error:
        raise SettingsError(f"the method {what} cannot be run: {type(error).__name__}: {error}") from error


def read(directory: str | os.PathLike[str], model: nn.Module | None = None) -> AdapterFile:
    """An adapter folder, of whatever method here or of HF PEFT's.

    Args:
        directory: it; with `model` also a LoRA file of diffusers or kohya.
        model: whose modules such a file's names mean.

    Raises:
        AdapterError: a missing, truncated, altered or foreign file, or a PEFT setting that no method here means.
    """
    from pegbox.core import files, lora_names

    if model is not None and lora_names.found_at(directory):
        return lora_names.read(directory, model, catalogue().values())
    return files.read(directory, catalogue().values(), bridge=peft_bridge.of_config)


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
