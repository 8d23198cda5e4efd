"""What a model is made of, what a method would tune of it, and what an adapter folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox import methods
from pegbox.core.errors import SettingsError
from pegbox.core.settings import build, setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What `pegbox inspect` takes as `key=value`."""

    model: str | None = setting(None, "a folder, a hub id, or a model that ships in an installed package")
    adapter: str | None = setting(None, "folder of an adapter")
    method: str | None = setting(None, "show what this method would tune of the model")
    method_settings: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the method, written as method.rank=8"}
    )


def inspect_settings(values: Mapping[str, Any]) -> InspectSettings:
    """Settings from plain values, `method.KEY` being the method's own."""
    inner = {k.removeprefix("method."): v for k, v in values.items() if k.startswith("method.")}
    own = {k: v for k, v in values.items() if not k.startswith("method.")}
    inner |= own.get("method_settings") or {}
    made = build(InspectSettings, own | {"method_settings": inner}, what="inspect")
    if made.method is not None:
        methods.make(made.method, made.method_settings)
    elif made.method_settings:
        raise SettingsError("inspect has settings of a method and no method; give method=NAME")
    return made


def inspect(settings: InspectSettings) -> str:
    """A text for the terminal.

    Raises:
        AdapterError, ModelError: what is to be shown cannot be read.
        TargetError: the method finds nothing to tune in this model.
    """
    parts = []
    if settings.adapter is not None:
        parts.append(about_adapter(Path(settings.adapter)))
    if settings.model is not None:
        model = skeleton(settings.model)
        parts.append(about_model(model))
        if settings.method is not None:
            parts.append(about_method(model, settings))
    return "\n\n".join(parts)


def skeleton(name: str) -> nn.Module:
    """A model without its weights, by the class it names itself: structure and sizes, at no cost.

    Raises:
        ModelError: there is no model, or no class for it.
    """
    import torch
    import transformers

    import pegbox.train.pooled as pooled
    from pegbox.core.errors import ModelError
    from pegbox.train.model import locate

    try:
        config = transformers.AutoConfig.from_pretrained(locate(name))
        wanted = (config.architectures or ["AutoModel"])[0]
        cls: Any = getattr(transformers, wanted, None) or getattr(pooled, wanted, transformers.AutoModel)
        with torch.device("meta"):
            made = cls.from_config(config) if cls is transformers.AutoModel else cls(config)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"the model {name!r} cannot be read: {first}") from error
    return made


def about_model(model: nn.Module) -> str:
    """Class, size and roles."""
    from pegbox import anatomy

    count = sum(p.numel() for p in model.parameters())
    config: Any = model.config
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return f"{type(model).__name__}, {count:,} parameters, {dtype}\n{anatomy.of(model).describe()}"


def about_method(model: nn.Module, settings: InspectSettings) -> str:
    """What a method would tune."""
    import pegbox

    assert settings.method is not None
    tuned = pegbox.tune(model, methods.make(settings.method, settings.method_settings))
    some, all_ = tuned.count()
    paths = list(tuned.sites)
    tuned.detach()
    where = f"{len(paths)} modules: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}" if paths else "in place"
    return f"{settings.method}: {some:,} of {all_:,} parameters train ({100 * some / all_:.3g} %), {where}"


def about_adapter(folder: Path) -> str:
    """What an adapter folder says of itself.

    Raises:
        AdapterError: a missing, damaged or foreign file.
    """
    from pegbox.core import files

    file = methods.read(folder)
    count = sum(t.numel() for t in file.tensors.values())
    size = (folder / files.TENSORS).stat().st_size
    extra = {k: f"{len(v)} of them" if isinstance(v, list) and len(v) > 8 else v for k, v in file.extra.items()}
    rows = {
        "method": file.method,
        **{f"  {k}": v for k, v in file.settings.items()},
        "also trained": ", ".join(file.also_train) or "-",
        "base": file.base or "not named",
        "fingerprint": file.fingerprint or "-",
        "tensors": f"{len(file.tensors)}, {count:,} numbers, {size / 1e6:.1f} MB",
        **extra,
    }
    wide = max(map(len, rows))
    return "\n".join([f"adapter {folder}", *(f"  {k:<{wide}}  {v}" for k, v in rows.items())])
