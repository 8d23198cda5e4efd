"""Resident memory of this process, from Linux's /proc, in MiB.

The peak of a measurement is VmHWM, the high-water mark of resident memory, set back to the present when the model is
ready, so that neither imports nor building the model count as the peak.  It holds the interpreter, the libraries, the
weights, the optimizer and everything a step allocates.
"""

from __future__ import annotations

import gc
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident() -> float:
    """What is resident now."""
    return _field("VmRSS")


def peak() -> float:
    """The most that was resident since `forget_peak`."""
    return _field("VmHWM")


def forget_peak() -> None:
    """Start the high-water mark anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _field(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024  # kB
