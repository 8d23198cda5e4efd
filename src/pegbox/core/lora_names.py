"""LoRA files of diffusers and of kohya's scripts: their names for PEFT's tensors, both ways.

                  at the module down_blocks.0.attentions.0.to_q of a U-Net
    PEFT          base_model.model.down_blocks.0.attentions.0.to_q.lora_A.weight
    diffusers     [unet.]down_blocks.0.attentions.0.to_q.lora_A.weight            and older spellings, see ENDS
    kohya         lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight      beside .lora_up.weight and .alpha

All three mean W + alpha / rank * B A.  Kohya and older diffusers may give every module its own rank and alpha; where
they differ, the scale goes into B and lower ranks are filled up with zeros, which changes no output.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pegbox.core import files, peft_files
from pegbox.core.adapter import State
from pegbox.core.errors import AdapterError, SettingsError, did_you_mean
from pegbox.core.layout import is_conv1d
from pegbox.core.method import Method
from pegbox.core.sharded import whole
from pegbox.core.tuned import Tuned

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of it
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in the file's header
KOHYA = "lora_unet_"
COMPONENTS = ("unet", "transformer")  # of a pipeline, whose files name them first
OTHERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")  # parts for other models
ENDS = {  # how a key ends -> which of a module's tensors it is
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".alpha": "alpha",
}

log = logging.getLogger("pegbox")


@dataclass(frozen=True)
class Factors:
    """What a file holds for one module: A (r, in, ...), B (out, r, ...), alpha or None."""

    a: Tensor
    b: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def found_at(path: str | os.PathLike[str]) -> Path | None:
    """The LoRA file of diffusers or kohya that a path names: the file itself, or diffusers' in a folder; else None."""
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return place
    inside = place / FILE
    return inside if inside.is_file() and not (place / files.CONFIG).is_file() else None


def read(path: str | os.PathLike[str], model: nn.Module, methods: Iterable[type[Method]]) -> files.AdapterFile:
    """Read a LoRA file of diffusers or kohya for a model.

    Args:
        path: of the file, or of a folder that diffusers has written.
        model: whose modules its names mean.
        methods: the classes that it may be of.

    Raises:
        AdapterError: a damaged file, a name that is none of this model's, or something else than plain LoRA.
    """
    place = found_at(path)
    if place is None:
        raise AdapterError(f"{path} holds no LoRA file: there is no {FILE}")
    metadata, tensors = files.read_tensors(place)
    given = _configuration(metadata)
    by_module = _by_module(tensors, dict(model.named_modules()), place)
    r, alpha, state = _united(by_module, given)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": bool(given.get("use_rslora"))}
    return files.from_peft(config, state, methods, place)


def write(
    tuned: Tuned,
    path: str | os.PathLike[str],
    *,
    names: Literal["diffusers", "kohya"] = "diffusers",
    component: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a LoRA adapter as one file that diffusers, or what reads kohya's files, loads.

    Args:
        path: of a file, or a folder in which it gets diffusers' name.
        names: whose names.
        component: `unet` or `transformer` for a file of a whole pipeline; None for one of the model alone.
        name: of the adapter; the one in use if none is given.

    Raises:
        AdapterError: the method has no plain LoRA form.
        SettingsError: `names` is neither of the two.
    """
    if names not in ("diffusers", "kohya"):
        raise SettingsError(f"names must be 'diffusers' or 'kohya', got {names!r}")
    adapter = tuned.adapter(name)
    folder = not str(path).endswith(".safetensors")
    place = Path(path) / FILE if folder else Path(path)
    config, state = files.as_peft(tuned, name)
    parts = {key.removeprefix(peft_files.PEFT_ROOT): whole(v).contiguous().cpu() for key, v in state.items()}
    strange = [key for key in parts if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if config.get("peft_type") != "LORA" or strange:
        raise AdapterError(f"{adapter.method.name()} has no plain LoRA form, which {names}' files hold")
    place.parent.mkdir(parents=True, exist_ok=True)
    if names == "kohya":
        _save(place, _in_kohyas_names(parts, config), {})
    else:
        start = f"{component}." if component else ""
        said = {f"{start}{key}": value for key, value in config.items()}
        _save(place, {f"{start}{k}": v for k, v in parts.items()}, {METADATA: json.dumps(said, sort_keys=True)})
    return place


def _save(place: Path, tensors: State, metadata: Mapping[str, str]) -> None:
    part = place.with_suffix(".partial")
    save_file(tensors, part, metadata={"format": "pt", **metadata})
    os.replace(part, place)


def _in_kohyas_names(parts: State, config: Mapping[str, Any]) -> State:
    out: State = {}
    for key, value in parts.items():
        path, _, tail = key.rpartition(".lora_")
        stem = KOHYA + path.replace(".", "_")
        out[f"{stem}.{'lora_down' if tail[0] == 'A' else 'lora_up'}.weight"] = value
        if tail[0] == "A":
            out[f"{stem}.alpha"] = torch.tensor(_alpha(float(config["lora_alpha"]), len(value), config))
    return out


def _alpha(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """The alpha that, divided by the rank, is the scale that the configuration means."""
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


# -- reading -----------------------------------------------------------------------------------------------------


def _configuration(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration from diffusers' header, without the name of a component."""
    try:
        said = json.loads(metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"the file's header has a damaged {METADATA}: {error}") from error
    return {re.sub(rf"^({'|'.join(COMPONENTS)})\.", "", key): value for key, value in said.items()}


def _by_module(tensors: State, modules: Mapping[str, nn.Module], place: Path) -> dict[str, Factors]:
    """Factors by path of the model's modules."""
    flat = {path.replace(".", "_"): path for path in modules}
    found: dict[str, dict[str, Tensor]] = {}
    others = [key for key in tensors if key.startswith(OTHERS)]
    for key in tensors.keys() - set(others):
        path, part = _parted(key, flat, place)
        if path not in modules:
            raise AdapterError(
                f"{place}: {key} names no module of this model{did_you_mean(path, filter(None, modules))}"
            )
        found.setdefault(path, {})[part] = tensors[key]
    if others:
        log.info("%s: %d tensors are for a text encoder, and not for this model", place, len(others))
    if not found:
        raise AdapterError(f"{place} holds nothing for this model")
    return {path: _factors(path, parts, modules[path], place) for path, parts in sorted(found.items())}


def _parted(key: str, flat: Mapping[str, str], place: Path) -> tuple[str, str]:
    """The module's path, as far as the key tells, and which of its tensors this is."""
    end = next((end for end in ENDS if key.endswith(end)), None)
    if end is None:
        raise AdapterError(f"{place}: {key} is no tensor of plain LoRA; known endings: {', '.join(ENDS)}")
    stem = key.removesuffix(end)
    if stem.startswith(KOHYA):
        short = stem.removeprefix(KOHYA)
        short = short if short in flat else _in_diffusers_layout(short, _layers(flat))
        return flat.get(short, short), ENDS[end]
    stem = stem.removeprefix(peft_files.PEFT_ROOT).replace(".processor.", ".")
    stem = re.sub(rf"^({'|'.join(COMPONENTS)})\.", "", stem)
    old = end.startswith("_")  # to_q_lora.down of an attention processor; its to_out is a list of two
    return (f"{stem}.0" if old and stem.endswith("to_out") else stem), ENDS[end]


def _layers(flat: Iterable[str]) -> int:
    """Layers of a down block, by the flat names of a U-Net's modules."""
    return sum(re.fullmatch(r"down_blocks_0_resnets_\d+", name) is not None for name in flat)


def _factors(path: str, parts: Mapping[str, Tensor], module: nn.Module, place: Path) -> Factors:
    missing = [part for part in ("A", "B") if part not in parts]
    if missing:
        raise AdapterError(f"{place}: {path} has no {missing[0]}, expected both factors")
    a, b = parts["A"], parts["B"]
    if isinstance(module, nn.Linear) or is_conv1d(module):  # kohya may keep what was a 1 x 1 convolution once
        a, b = a.flatten(1), b.flatten(1)
    return Factors(a, b, float(parts["alpha"]) if "alpha" in parts else None)


def _united(found: Mapping[str, Factors], config: Mapping[str, Any]) -> tuple[int, float, State]:
    """One rank, one alpha, and tensors in PEFT's names that mean the same with them."""
    scales = {path: _scale(path, factors, config) for path, factors in found.items()}
    ranks = {factors.rank for factors in found.values()}
    r = max(ranks)
    alike = len(ranks) == 1 and len(set(scales.values())) == 1
    scale = next(iter(scales.values())) if alike else 1.0
    state: State = {}
    for path, factors in found.items():
        b = factors.b if alike else scales[path] * factors.b
        state[f"{peft_files.PEFT_ROOT}{path}.lora_A.weight"] = _filled(factors.a, r, 0)
        state[f"{peft_files.PEFT_ROOT}{path}.lora_B.weight"] = _filled(b, r, 1)
    return r, scale * (r**0.5 if config.get("use_rslora") else r), state


def _scale(path: str, factors: Factors, config: Mapping[str, Any]) -> float:
    """alpha / rank of one module; 1 where nothing says an alpha."""
    alpha = factors.alpha
    if alpha is None:
        patterns = config.get("alpha_pattern") or {}
        matching = (a for pattern, a in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path))
        alpha = next(matching, config.get("lora_alpha", factors.rank))
    return float(alpha) / (factors.rank**0.5 if config.get("use_rslora") else factors.rank)


def _filled(value: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros appended along `dim` up to the rank."""
    missing = rank - value.shape[dim]
    if not missing:
        return value
    shape = [missing if i == dim else n for i, n in enumerate(value.shape)]
    return torch.cat([value, value.new_zeros(shape)], dim)


# -- the original layout -------------------------------------------------------------------------------------------

INSIDE = {  # of a layer in the original layout -> in diffusers'
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {  # of the blocks
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def _in_diffusers_layout(short: str, layers: int) -> str:
    """A flat name of Stable Diffusion's original layout, in which kohya's scripts train XL, as diffusers has it.

    Args:
        short: such as `input_blocks_4_1_transformer_blocks_0_attn1_to_q`; any other comes back as it is.
        layers: of a down block; an up block has one more.
    """
    if short in OUTSIDE:
        return OUTSIDE[short]
    found = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)|(middle_block)_(\d+)_(.+)", short)
    if not found:
        return short
    if found[5]:
        kind, place = ("resnets", "attentions", "resnets")[int(found[6])], int(found[6]) // 2
        return f"mid_block_{kind}_{place}_{INSIDE.get(found[7], found[7])}"
    side, rest = "down" if found[1] == "input_blocks" else "up", found[4]
    block, layer = divmod(int(found[2]) - (side == "down"), layers + 1)
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    return f"{side}_blocks_{block}_{('resnets', 'attentions')[int(found[3])]}_{layer}_{INSIDE.get(rest, rest)}"
