"""The most memory that a stretch of work held.

On a GPU, what its allocator held.  Else the resident memory of the whole process (interpreter, libraries, data and
base included), from Linux's high-water mark VmHWM, which proc(5) lets a process set back to the present by writing 5
to clear_refs.  What earlier work freed is given back to the system first, or it would count for the later.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Start counting anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        _give_back()
        RESET.write_text("5")


def peak() -> int | None:
    """Bytes at the highest point since `forget_peak`; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside, garbage is sought among new objects alone: libraries make a million, and each search takes 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _give_back() -> None:
    """glibc's malloc_trim; other C libraries return what is freed, or have no such call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return
