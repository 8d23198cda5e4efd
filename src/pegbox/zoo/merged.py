"""An adapter of the zoo merged into its base, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import pegbox
from pegbox.core.errors import ModelError

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
BESIDE = ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja", "README.md")


def merged(base: Path, adapter: Path, cache: Path) -> Path:
    """The folder of the merged model; written on the first call, to a temporary name and renamed.

    Args:
        base: folder of the base
        adapter: folder of the adapter, with what else the model needs beside it
        cache: folder of such folders

    Raises:
        ModelError: the cache cannot be written.
    """
    digest = hashlib.sha256()
    for place, weights in zip((base, adapter), WEIGHTS, strict=True):
        digest.update((place / weights).read_bytes())
    final = cache / f"{adapter.name}-{digest.hexdigest()[:12]}"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{adapter.name}-", dir=cache))
    except OSError as error:
        raise ModelError(
            f"{adapter.name} is merged when first used, and {cache} cannot be written ({error.strerror}); "
            "set PEGBOX_CACHE to a folder that can"
        ) from error
    try:
        _write(base, adapter, partial)
        os.replace(partial, final)
    except OSError as error:
        if not final.is_dir():  # another process was first
            raise ModelError(f"{final} cannot be written ({error.strerror}); set PEGBOX_CACHE elsewhere") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _write(base: Path, adapter: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole: Any = pegbox.load(model, adapter).merge()
    whole.to(torch.bfloat16).save_pretrained(folder)
    for place in (base, adapter):  # what both have is the adapter's
        for path in (path for pattern in BESIDE for path in place.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
