"""A whole model to a folder and back, and whether what came back has the same bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pegbox.core import storage

TENSORS_FILE = "model.safetensors"


def weight_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}


def save(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A model as safetensors, with its configuration where it is transformers' own."""
    from safetensors.torch import save_model
    from transformers import PreTrainedModel

    narrowed = {k: _as(v, dtype) for k, v in model.state_dict().items()} if dtype else None
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict=narrowed)
        if dtype:
            _note_dtype(folder, dtype)
        return
    if dtype:
        model = copy.deepcopy(model).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / TENSORS_FILE))


def reload(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model saved in `folder`, on the device of `model`, which only lends its class (or, outside transformers, a
    copy of itself whose values are wiped first)."""
    from safetensors.torch import load_model
    from transformers import PreTrainedModel

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(model, PreTrainedModel):
        attention = model.config._attn_implementation
        again: nn.Module = type(model).from_pretrained(
            folder, dtype=dtype or model.dtype, attn_implementation=attention
        )
        here = next((p.device for p in again.parameters()), device) == device  # a quantised model may not be moved
        return (again if here else again.to(device)).eval()
    blank = copy.deepcopy(model).to(dtype=dtype)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    load_model(blank, str(folder / TENSORS_FILE))
    return blank.to(device).eval()


def unequal_tensors(model: nn.Module, again: nn.Module) -> tuple[str, ...]:
    """Names whose tensors are missing in one of two models or have other bits, after the second one's dtype."""
    ours, theirs = model.state_dict(), again.state_dict()
    odd = ours.keys() ^ theirs.keys()
    return tuple(k for k in (*ours, *theirs) if k in odd) + tuple(
        k for k in ours if k not in odd and not _same(ours[k].to(theirs[k].dtype), theirs[k])
    )


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = storage.numbers(a).cpu(), storage.numbers(b).cpu()
    return a.shape == b.shape and torch.equal(a, b)


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _note_dtype(folder: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` writes the dtype of the model, which is not that of the tensors it was given."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n")
