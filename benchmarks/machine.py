"""What a measurement was made on: processor, memory, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from pegbox.core.cpu import multiplies_bf16

PACKAGES = ("torch", "transformers", "peft", "accelerate", "pegbox")


def facts() -> dict[str, str]:
    """The machine in words, by what they describe."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "AMX": "present" if torch.cpu._is_amx_tile_supported() else "absent",
        "bfloat16": "as fast as float32 or faster" if multiplies_bf16() else "slower than float32",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def load() -> float:
    """Processes that wanted to run during the last minute, on average."""
    return os.getloadavg()[0]


def best_dtype() -> str:
    """What a user would choose here: bf16 where it is multiplied fast, else fp32."""
    return "bf16" if multiplies_bf16() else "fp32"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
