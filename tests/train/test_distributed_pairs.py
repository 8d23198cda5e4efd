"""Two processes on gloo learn from pairs what one learns: the reference, the losses, and what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import distributed_pairs
from .launch import in_two_processes


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    found = in_two_processes("distributed_pairs.py", tmp_path)
    for name, (objective, _) in distributed_pairs.JOBS.items():
        alone = distributed_pairs.job(tmp_path / f"{name} alone", objective, 1)
        assert found[name]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert found[name]["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert found[name]["reward_margin"] == pytest.approx(alone["reward_margin"], abs=1e-4)
