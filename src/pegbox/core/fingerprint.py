"""A short hash of a base model, so that an adapter knows where it belongs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pegbox.core.sharded import whole

SAMPLES = 256  # values hashed per tensor; evenly spread


@torch.no_grad()
def fingerprint(model: nn.Module, *, without: Iterable[str] = ()) -> str:
    """Hash of parameter names, shapes and sampled values.

    Values are compared as bfloat16, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint.

    Args:
        without: paths of modules to leave out: those an adapter replaces whole, a fresh classification head say.
    """
    skip = tuple(without)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{path}.") for path in skip):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_sample(parameter).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor) -> Tensor:
    flat = whole(parameter.detach()).reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES].to(torch.bfloat16)
