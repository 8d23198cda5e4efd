"""A base kept in a few bits: loaded so, and trained over, which transformers allows only where it knows of adapters.

    nf4     bitsandbytes, blocks of 64, the scales quantised too: QLoRA's base (Dettmers et al., 2023, arXiv:2305.14314)
    int8    bitsandbytes, a scale a row
    int4    torchao, groups of 32

Embeddings, norms, the head and whatever the files do not hold stay plain numbers, and so do layers whose input is no
multiple of a block: torchao refuses those, and bitsandbytes' kernel for CPUs (0.50) decodes them wrongly.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pegbox.core import Tuned, storage
from pegbox.core.errors import MethodError, MissingExtra, ModelError
from pegbox.core.layout import is_linear, layout_of

LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4": "torchao"}
BLOCKS = {"nf4": 64, "int4": 32}  # numbers that share a scale
KNOWN_AS = "_hf_peft_config_loaded"  # transformers' word for "trainable adapters are attached"


def allow_quantised(tuned: Tuned) -> None:
    """Tell a trainer that what trains of a quantised model are adapters; of any other model, do nothing.

    Raises:
        MethodError: a method trains the base's own tensors, which are stored in a few bits.
    """
    base: Any = tuned.model
    if not getattr(base, "is_quantized", False):  # transformers sets it on the models it quantises
        return
    own = [name for name in tuned.active if not tuned.adapter(name).method.traits.keeps_base]
    if own or any(p.requires_grad and not p.dtype.is_floating_point for p in base.parameters()):
        method = tuned.adapter(own[0]).method.name() if own else "this method"
        stored = getattr(base, "quantization_method", None)
        how = getattr(stored, "value", stored) or "a quantiser"
        raise MethodError(
            f"{method} trains the base's own tensors, and this base is stored by {how} in a few bits that no gradient "
            "can change; use a method that keeps the base (lora, series, ...), or load the base unquantised"
        )
    setattr(tuned, KNOWN_AS, True)


def in_few_bits(
    load: Callable[..., tuple[nn.Module, tuple[str, ...]]], how: str, place: str, dtype: torch.dtype
) -> tuple[nn.Module, tuple[str, ...]]:
    """A base as `load` loads it, with its linear layers kept as `how`.

    Args:
        load: takes the keywords of `from_pretrained`; gives a model and the paths of what its files do not hold.
        how: `none`, or a key of LIBRARIES.
        place: of its files.

    Raises:
        ModelError: there is nothing to quantise, or it is quantised already.
    """
    if how == "none":
        return load()
    _check_plain(place, how)
    model, new = load(quantization_config=_configuration(how, dtype, _ragged(place, how)))
    if heads := _beside_the_body(model, new):
        left = [path for path, m in model.named_modules() if is_linear(m) and not _is_quantised(m)]
        model, new = load(quantization_config=_configuration(how, dtype, [*left, *heads]))
    if not storage.quantised_parameters(model):
        raise ModelError(
            f"{type(model).__name__} of {place!r} has no linear layer to keep as {how}; leave quantise={how} out"
        )
    storage.still(model)
    return model, new


def check_available(how: str, wanted_by: str | None = None) -> None:
    """Raise MissingExtra where the library that keeps a base as `how` is not installed.

    Args:
        wanted_by: who asked for it, for the message; the setting itself if not given.
    """
    if how != "none" and importlib.util.find_spec(LIBRARIES[how]) is None:
        raise MissingExtra(LIBRARIES[how], "quantised", wanted_by or f"quantise={how}")


def _check_plain(place: str, how: str) -> None:
    """Raise ModelError where a base's files are quantised already."""
    from transformers import AutoConfig

    said: Any = getattr(AutoConfig.from_pretrained(place), "quantization_config", None)
    if said is not None:
        method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
        raise ModelError(f"the files of {place!r} are quantised already, by {method}; leave quantise={how} out")


def _configuration(how: str, dtype: torch.dtype, plain: list[str] | None) -> Any:
    """transformers' own words for it.

    Args:
        plain: patterns of the paths of modules to leave; what it leaves by itself if None.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if how == "int4":
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        four: torch.dtype = getattr(torch, how)
        return TorchAoConfig(IntxWeightOnlyConfig(four, PerGroup(BLOCKS["int4"])), modules_to_not_convert=plain)
    if how == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=plain,
    )


def _ragged(place: str, how: str) -> list[str] | None:
    """Patterns of linear layers whose input is no multiple of a block, from the configuration alone; None of none."""
    from transformers import AutoConfig, AutoModel

    if how not in BLOCKS:
        return None
    with torch.device("meta"):
        body = AutoModel.from_config(AutoConfig.from_pretrained(place))
    linears = {path: layout_of(m, "weight").read(m.weight) for path, m in body.named_modules() if is_linear(m)}
    ragged = [path for path, matrix in linears.items() if matrix.shape[1] % BLOCKS[how]]
    return [rf"(.*\.)?{re.escape(path)}" for path in ragged] or None


def _beside_the_body(model: nn.Module, new: Sequence[str]) -> list[str]:
    """Quantised modules that should be plain: heads, and what the files do not hold."""
    body = getattr(model, "base_model_prefix", "")
    inside = f"{body}." if body and hasattr(model, body) else ""
    quantised = [path for path, module in model.named_modules() if _is_quantised(module)]
    return [path for path in quantised if path in new or not path.startswith(inside)]


def _is_quantised(module: nn.Module) -> bool:
    return "weight" in module._parameters and storage.name(module, "weight") is not None
