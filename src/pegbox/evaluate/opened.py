"""An adapter folder, a model folder or a model at hand, opened for use: the model ready to run, and its tokenizer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import pegbox
from pegbox import methods
from pegbox.core import files
from pegbox.core.errors import ModelError
from pegbox.core.files import AdapterFile
from pegbox.core.tuned import Tuned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the class that loads a base, by PEFT's task type or the objective of the run
LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "sft": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
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
    name: str = "default",
) -> Opened:
    """Load a base, and an adapter folder onto it.

    Args:
        model: the base, by name or folder, or a module (which an adapter that trains the base leaves alone: it gets a
            copy); the base that the adapter names if not given.
        tokenizer: the adapter's own, else the base's, if not given.
        dtype: of the base; `auto` for that of its file.

    Raises:
        AdapterError: no adapter there, or one of another base.
        ModelError: the base cannot be loaded, or the adapter names none.
    """
    folder = Path(adapter)
    file = files.read(folder, methods.catalogue().values())
    base = _base_of(file, model)
    keeps = methods.get(file.method).traits.keeps_base

    def load() -> nn.Module:
        if not isinstance(model, nn.Module):
            return load_base(str(base), file, folder, dtype)
        return model if keeps else copy.deepcopy(model)

    tuned = pegbox.load(load(), folder, name=name)

    def fresh() -> nn.Module:
        untouched = tuned.detach()
        return untouched if keeps else load()

    tokenizer = tokenizer or load_tokenizer(folder) or (load_tokenizer(base) if base else None)
    return Opened(tuned, tokenizer, file, folder, base, fresh)


def open_model(
    what: str | os.PathLike[str] | nn.Module,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from an adapter folder, a model's name or folder, or a module.

    Raises:
        ModelError: it cannot be loaded, or has no tokenizer.
    """
    if isinstance(what, nn.Module):
        base = getattr(getattr(what, "config", None), "name_or_path", None)
        return what, tokenizer or _required(load_tokenizer(base) if base else None, type(what).__name__)
    if is_adapter(what):
        opened = open_adapter(what, model=model, tokenizer=tokenizer, dtype=dtype)
        return opened.tuned, _required(opened.tokenizer, str(what))
    name = os.fspath(what)
    return load_base(name, None, None, dtype).eval(), tokenizer or _required(load_tokenizer(name), name)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(path) / files.CONFIG).is_file()


def load_base(name: str, file: AdapterFile | None, folder: Path | None, dtype: str = "auto") -> nn.Module:
    """A base by name or folder, by the class that the adapter's task asks for, else the one the base itself names.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        task = _task(file, folder)
        own = (config.architectures or ["AutoModel"])[0]
        loader = getattr(transformers, LOADERS[task] if task else own)
        labels = _labels(file)
        return loader.from_pretrained(name, dtype=dtype, **labels)
    except (OSError, ValueError, AttributeError) as error:
        what = f"the base {name!r} of adapter {str(folder)!r}" if folder else f"the model {name!r}"
        raise ModelError(f"{what} cannot be loaded ({_first_line(error)}); pass model= with its folder") from error


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a name or folder; None where there is none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(os.fspath(name))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _base_of(file: AdapterFile, model: str | os.PathLike[str] | nn.Module | None) -> str | None:
    if isinstance(model, nn.Module):
        return getattr(getattr(model, "config", None), "name_or_path", None) or file.base
    if not (model or file.base):
        raise ModelError("this adapter does not name its base; pass model= with its name, folder or the module")
    return os.fspath(model) if model else file.base


def _task(file: AdapterFile | None, folder: Path | None) -> str | None:
    """The objective that the run noted, else PEFT's task type; None where neither is known here."""
    noted = file.extra.get("objective") if file else None
    if noted in LOADERS:
        return str(noted)
    if folder is None:
        return None
    kind = json.loads((folder / files.CONFIG).read_text()).get("task_type")
    return kind if kind in LOADERS else None


def _labels(file: AdapterFile | None) -> dict[str, Any]:
    labels = file.extra.get("labels") if file else None
    if not labels:
        return {}
    names = list(labels)
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(map(str, names))),
        "label2id": {str(name): k for k, name in enumerate(names)},
        "ignore_mismatched_sizes": True,
    }


def _required(tokenizer: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ModelError(f"{what} has no tokenizer beside it; pass tokenizer=")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
