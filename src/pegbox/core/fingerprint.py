"""A short hash of a base model, so that an adapter knows where it belongs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pegbox.core import storage
from pegbox.core.sharded import whole

SAMPLES = 256  # values hashed per tensor; evenly spread


@torch.no_grad()
def fingerprint(model: nn.Module, *, without: Iterable[str] = ()) -> str:
    """Hash of parameter names, shapes and sampled values.

    Values are compared as bfloat16, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint.
    Quantised ones are compared decoded.

    Args:
        without: paths of modules to leave out: those an adapter replaces whole, a fresh classification head say.
    """
    skip = tuple(without)
    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        if any(name.startswith(f"{path}.") for path in skip):
            continue
        path, _, leaf = name.rpartition(".")
        value = storage.mark(model.get_submodule(path), leaf)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(_sample(value).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor) -> Tensor:
    flat = whole(parameter.detach()).reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES].to(torch.bfloat16)
