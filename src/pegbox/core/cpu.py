"""Which dtype a processor multiplies fastest."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

LEAST_ROWS = 64  # below, widening a matrix costs more than the faster product saves


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply x (..., n) with a matrix: its own, or float32 where that is faster.

    An x86 processor without matrix units (AMX) multiplies bfloat16 at half the rate of float32, measured on an Emerald
    Rapids without them: 83 against 157 GFLOP/s a core.  Widening costs a few percent of the product, and sums are no
    less exact for it.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.numel() < LEAST_ROWS * x.shape[-1]:
        return x.dtype
    return x.dtype if multiplies_bf16() else torch.float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bf16() -> bool:
    """Whether this processor's bfloat16 products are at least as fast as its float32 products."""
    return _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # ARM's and POWER's bfloat16 instructions are matrix instructions
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_intel()  # AMD's AVX512_BF16 runs at the full rate


def _is_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return not info.is_file() or "GenuineIntel" in info.read_text()
