"""A half-precision model run in float32 for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pegbox.core import storage


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Half-precision tensors are widened in place and narrowed again after; both are exact.

    Quantised layers compute in float32.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if type(t) in (nn.Parameter, Tensor)]
    half = [t for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    before = [t.dtype for t in half]
    quantised = storage.widen(model)
    try:
        for t in half:
            t.data = t.data.float()
        yield
    finally:
        for t, dtype in zip(half, before, strict=True):
            t.data = t.data.to(dtype)
        for module, attribute, was in quantised:
            setattr(module, attribute, was)
