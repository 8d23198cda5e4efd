"""An adapter folder, a model folder or a model at hand, opened for use: the model ready to run, and its tokenizer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

import pegbox
from pegbox import methods
from pegbox.core import files
from pegbox.core.errors import ModelError
from pegbox.core.files import AdapterFile
from pegbox.core.seeding import seeded
from pegbox.core.tuned import Tuned
from pegbox.train.model import LOADERS, load, locate, why_unread
from pegbox.train.quantised import check_available, in_few_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the class that loads a base, by PEFT's task type
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Opened:
    """An adapter on its base.

    Attributes:
        base: the base's name, folder or, where a module was given, its own name if it has one.
        fresh: gives a base that the adapter has not touched; the adapter is off `tuned` afterwards.
    """

    tuned: Tuned
    tokenizer: PreTrainedTokenizerBase | None
    file: AdapterFile
    folder: Path
    base: str | None
    fresh: Callable[[], nn.Module]


def open_adapter(
    adapter: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    quantise: str = "auto",
    name: str = "default",
) -> Opened:
    """Load a base, and an adapter folder onto it.

    Args:
        model: the base, by name or folder, or a module (which an adapter that trains the base leaves alone: it gets a
            copy); the base that the adapter names if not given.
        tokenizer: the adapter's own, else the base's, if not given.
        dtype: of the base; `auto` for that of its file, or where it is quantised that of the run.
        quantise: how the base is kept; `auto` for as the run had it.

    Raises:
        AdapterError: no adapter there, or one of another base.
        ModelError: the base cannot be loaded, or the adapter names none.
        MissingExtra: the library that quantises is not installed.
    """
    folder = Path(adapter)
    file = methods.read(folder)
    base = _base_of(file, model)
    keeps = methods.get(file.method).traits.keeps_base

    def untouched() -> nn.Module:
        if not isinstance(model, nn.Module):
            with seeded(0, "base"):  # what the base's files lack, a fresh head say, is drawn
                return load_base(str(base), file, folder, dtype, quantise)
        return model if keeps else copy.deepcopy(model)

    tuned = pegbox.load(untouched(), folder, name=name)

    def fresh() -> nn.Module:
        base = tuned.detach()
        return base if keeps else untouched()

    tokenizer = tokenizer or load_tokenizer(folder) or (load_tokenizer(locate(base)) if base else None)
    return Opened(tuned, tokenizer, file, folder, base, fresh)


def open_model(
    what: str | os.PathLike[str] | nn.Module,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    quantise: str = "auto",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from an adapter folder, a model's name or folder, or a module.

    Args:
        dtype, quantise: as of `open_adapter`.

    Raises:
        ModelError: it cannot be loaded, or has no tokenizer.
    """
    if isinstance(what, nn.Module):
        base = getattr(getattr(what, "config", None), "name_or_path", None)
        return what, tokenizer or _required(load_tokenizer(base) if base else None, type(what).__name__)
    if is_adapter(what):
        opened = open_adapter(what, model=model, tokenizer=tokenizer, dtype=dtype, quantise=quantise)
        return opened.tuned, _required(opened.tokenizer, str(what))
    name = os.fspath(what)
    base = load_base(name, dtype=dtype, quantise=quantise).eval()
    return base, tokenizer or _required(load_tokenizer(locate(name)), name)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, or what is left of one."""
    return any((Path(path) / name).is_file() for name in (files.CONFIG, files.TENSORS))


def load_base(
    name: str,
    file: AdapterFile | None = None,
    folder: Path | None = None,
    dtype: str = "auto",
    quantise: str = "auto",
) -> nn.Module:
    """A base by name or folder: as the run loaded it, else by the adapter's task, else by the class it names itself.

    Raises:
        ModelError: it cannot be loaded.
        MissingExtra: the library that quantises is not installed.
    """
    from transformers import AutoConfig

    import pegbox.train.pooled  # noqa: F401  (transformers learns a class of ours)

    noted = file.extra if file else {}
    try:
        place = locate(name)
        config = AutoConfig.from_pretrained(place)
        how, asked = _as_kept(noted, dtype, quantise)
        wanted = getattr(torch, asked) if asked != "auto" else getattr(config, "dtype", None) or torch.float32
        by = f"the base as in training, kept as {how} (quantise=none loads it plain)," if quantise == "auto" else None
        check_available(how, by)
        if noted.get("objective") in LOADERS:
            head = {key: noted[key] for key in ("labels", "multi_label") if key in noted}
            return load(place, noted["objective"], dtype=wanted, quantise=how, **head).model
        loader = _by_task(folder) or _by_architecture(config)
        return in_few_bits(lambda **more: (loader(place, dtype=wanted, **more), ()), how, place, wanted)[0]
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError, ModelError) as error:
        what = f"the base {name!r} of adapter {str(folder)!r}" if folder else f"the model {name!r}"
        hint = "; pass model= with its folder" if folder else ""
        raise ModelError(f"{what} cannot be loaded ({why_unread(error, name).rstrip('.')}){hint}") from error


def _as_kept(noted: Mapping[str, Any], dtype: str, quantise: str) -> tuple[str, str]:
    """How a base is to be kept, and of which dtype it is then, by what the run noted where nothing else is asked."""
    if quantise != "auto":
        return quantise, dtype
    how = noted.get("quantise", "none")
    return how, noted.get("dtype", dtype) if dtype == "auto" and how != "none" else dtype


def _by_task(folder: Path | None) -> Callable[..., Any] | None:
    """What loads a base for the task that PEFT's configuration names; None where it names none."""
    import transformers

    from pegbox.train.pooled import load_classifier

    if folder is None:
        return None
    kind = json.loads((folder / files.CONFIG).read_text()).get("task_type")
    if kind == "SEQ_CLS":
        return load_classifier
    return getattr(transformers, TASKS[kind]).from_pretrained if kind in TASKS else None


def _by_architecture(config: Any) -> Callable[..., Any]:
    import transformers

    from pegbox.train.pooled import MeanPooledForSequenceClassification as Ours

    name = (config.architectures or ["AutoModel"])[0]
    return Ours.from_pretrained if name == Ours.__name__ else getattr(transformers, name).from_pretrained


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a name or folder, of a vision model its image processor; None where there is none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(os.fspath(name))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return _load_processor(os.fspath(name))


def _load_processor(name: str) -> Any:
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _base_of(file: AdapterFile, model: str | os.PathLike[str] | nn.Module | None) -> str | None:
    if isinstance(model, nn.Module):
        return getattr(getattr(model, "config", None), "name_or_path", None) or file.base
    if not (model or file.base):
        raise ModelError("this adapter does not name its base; pass model= with its name, folder or the module")
    return os.fspath(model) if model else file.base


def _required(tokenizer: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ModelError(f"{what} has no tokenizer beside it; save one there, or pass tokenizer=")
    return tokenizer
