"""Two processes on gloo that run a script of this folder: how they start, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist


def in_two_processes(script: str, output: Path) -> dict[str, Any]:
    """Run `script OUTPUT`, a path from this folder, under torchrun; what it left in `found.json`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(Path(__file__).parent / script), str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((output / "found.json").read_text())
    return found


def end(found: dict[str, Any], output: Path) -> None:
    """Leave what was found to the test; called by both processes, which part together."""
    if dist.get_rank() == 0:
        (output / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
