"""One measurement in a fresh process: `python -m benchmarks.measure KIND '{"argument": 1}'` prints a line of JSON."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

KINDS = ("training", "chat", "decoding", "denoising", "pretraining", "experts", "streams", "calibration", "starting")


def fresh(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.measure", kind, json.dumps(arguments)]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} {arguments} failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def median_seconds(call: Callable[[], None], steps: int) -> float:
    """Of that many calls, after one to warm up."""
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    warnings.simplefilter("ignore")  # of dependencies; what fails, fails loudly
    kind, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(importlib.import_module(f"benchmarks.{kind}").measure(**arguments)))


if __name__ == "__main__":
    main()
