"""The verbs of the Python interface: `tune` a model, `load` an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pegbox import anatomy, methods
from pegbox.core import files
from pegbox.core.errors import AdapterError, SettingsError
from pegbox.core.graft import LowRankGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.method import Factors, Method
from pegbox.core.site import Site
from pegbox.core.tuned import Tuned


def tune(
    model: nn.Module,
    method: str | Method = "lora",
    *,
    name: str = "default",
    also_train: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> Tuned:
    """Put an adapter on a model, ready to train.

        tuned = pegbox.tune(model, "lora", rank=16)

    Args:
        model: any `nn.Module`; its parameters are frozen and its tensors left alone, unless the method trains them.
        method: a name from `pegbox methods`, or a method with its settings, `LoRA(rank=16)`.
        name: of the adapter.
        also_train: modules to train whole beside the method, `("head",)` for a new classifier.
        seed: of every draw that builds the adapter.
        settings: of the method, where it is given by name.

    Raises:
        SettingsError: an unknown method or setting, a wrong type or range.
        TargetError: a target that names nothing in this model.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"tune takes a model, any torch.nn.Module, got {model!r}; load it first")
    if not isinstance(method, (str, Method)):
        raise SettingsError(f"method must be a name or a method with its settings, LoRA(rank=16), got {method!r}")
    if isinstance(method, Method) and settings:
        raise SettingsError(f"settings are part of {method!r} already; got {', '.join(settings)} beside it")
    built = method if isinstance(method, Method) else methods.make(method, settings)
    adapters = [factors(model, folder) for folder in built.takes()]
    built = built.made_from(adapters)
    tuned = Tuned(model, anatomy.of(model), built, name=name, also_train=also_train, seed=seed)
    built.begin(tuned, name, adapters)
    return tuned


def factors(model: nn.Module, directory: str | os.PathLike[str]) -> Factors:
    """A (r, in) and B (out, r) of a saved low-rank adapter, by path; B has the scale in it.

    Raises:
        AdapterError: as from `load`, or an adapter that changes more than matrices by such products.
    """
    tuned = load(model, directory)
    try:
        return {path: _product(site, directory) for path, site in tuned.sites.items()}
    finally:
        tuned.detach()


def _product(site: Site, directory: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    (graft,) = site.chain
    if not isinstance(graft, LowRankGraft):
        raise AdapterError(
            f"{os.fspath(directory)} changes {site.path} by a {type(graft).__name__}, which is no product of two thin "
            "matrices, as LoRA's and MiSS's are"
        )
    down, up, scale = graft.factors()
    return as_matrix(down, site.shape[1], up).detach().clone(), (scale * up).detach()


def method(name: str, **settings: Any) -> Method:
    """A method by name, with its settings: `pegbox.method("lora", rank=16)`.

    Raises:
        SettingsError: an unknown method or setting, a wrong type or range.
    """
    return methods.make(name, settings)


def load(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default") -> Tuned:
    """Put a saved adapter on its base; on a tuned model, beside those it has.

    Args:
        model: the base, as it was when the adapter was trained.
        directory: a folder of Pegbox's or HF PEFT's, or a LoRA file of diffusers' or kohya's.
        name: of the adapter from now on.

    Raises:
        AdapterError: a damaged file, another base, or a tensor that has no place or the wrong shape.
    """
    file = methods.read(directory, model.model if isinstance(model, Tuned) else model)
    tuned = model if isinstance(model, Tuned) else Tuned(model, anatomy.of(model))
    files.put(file, tuned, methods.get(file.method), name)
    return tuned.eval()
