"""Two processes on gloo learn from pairs what one learns: the reference, the losses, and what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import distributed_pairs


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("distributed_pairs.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [*launch, str(tmp_path)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, (objective, _) in distributed_pairs.JOBS.items():
        alone = distributed_pairs.job(tmp_path / f"{name} alone", objective, 1)
        assert found[name]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert found[name]["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert found[name]["reward_margin"] == pytest.approx(alone["reward_margin"], abs=1e-4)
