"""`manifest.json`: what a run was, written when it starts and again when it ends, however it ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pegbox import __version__

NAME = "manifest.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "peft", "tokenizers", "numpy")


class Manifest:
    """The facts of one run; every change is on disk at once.

    Args:
        folder: of the run; None keeps the facts in memory, for all processes of a run but the first.
    """

    def __init__(self, folder: Path | None, **facts: Any) -> None:
        self.path = folder and folder / NAME
        self.facts = {"status": "running", "started": _now(), **_code(), "machine": _machine(), **facts}
        self.write()

    def update(self, **facts: Any) -> None:
        self.facts |= facts
        self.write()

    def end(self, status: str, **facts: Any) -> None:
        """Args: status: done, interrupted or failed."""
        self.update(status=status, ended=_now(), **facts)

    def write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_suffix(".partial")
        part.write_text(json.dumps(self.facts, indent=2, default=str) + "\n")
        os.replace(part, self.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _code() -> dict[str, Any]:
    return {
        "pegbox": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of Pegbox's own source, `+` if it has been changed since; None where it is installed without."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--", str(here.parent)],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
