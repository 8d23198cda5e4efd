"""What this machine multiplies fast, and how much memory a run has taken."""

from __future__ import annotations

import platform
import resource
import sys

import torch

from pegbox.core.cpu import multiplies_bf16


def bf16_units() -> str:
    """What multiplies bfloat16 faster than float32 here, `AMX` say; empty if nothing does."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return f"{platform.machine()} bfloat16 instructions" if multiplies_bf16() else ""


def choose_dtype(wanted: str, *, trains_base: bool) -> tuple[torch.dtype, str]:
    """The dtype of the base, and the reason in one line.

    Args:
        wanted: `auto`, or a dtype's name.
        trains_base: the method trains the base's own tensors, which are then their own masters.
    """
    if wanted != "auto":
        return getattr(torch, wanted), f"base in {wanted}, as asked"
    if trains_base:
        return torch.float32, "base in float32: the method trains the base itself, and small steps vanish in bfloat16"
    units = bf16_units()
    if units:
        return torch.bfloat16, f"base in bfloat16, which {units} multiplies fast; grafts in float32"
    return torch.float32, "base in float32: this machine has no bfloat16 matrix units"


def peak_memory() -> int:
    """The most memory this process has held, in bytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
