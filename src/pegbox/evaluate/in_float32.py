"""A half-precision model run in float32 for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Half-precision tensors are widened in place and narrowed again after; both are exact."""
    half = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    before = [t.dtype for t in half]
    try:
        for t in half:
            t.data = t.data.float()
        yield
    finally:
        for t, dtype in zip(half, before, strict=True):
            t.data = t.data.to(dtype)
