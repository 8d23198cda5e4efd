"""How long `import pegbox` and `pegbox --help` take, and whether they import torch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

IMPORT = """
import sys, time
start = time.perf_counter()
import pegbox
print(time.perf_counter() - start, "torch" in sys.modules)
"""
HELP = """
import sys
sys.argv = ["pegbox", "--help"]
from pegbox.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules)
"""
RUNS = 5


def measure() -> dict[str, Any]:
    """The fastest of several runs of each, in seconds; files are in the cache from the second on.

    `help` is None where the command is not installed or fails.
    """
    imports = [_python(IMPORT).split() for _ in range(RUNS)]
    command = Path(sysconfig.get_path("scripts")) / "pegbox"
    helped = [_run([str(command), "--help"]) for _ in range(RUNS)] if command.exists() else [None]
    works = all(seconds is not None for seconds in helped)
    return {
        "import": min(float(seconds) for seconds, _ in imports),
        "help": min(seconds for seconds in helped if seconds is not None) if works else None,
        "torch": int(any(torch == "True" for _, torch in imports) or (works and _python(HELP).endswith("True"))),
    }


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _run(command: list[str]) -> float | None:
    """Wall seconds, or None for a command that fails."""
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True)
    return time.perf_counter() - start if done.returncode == 0 else None
