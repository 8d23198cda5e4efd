"""Two processes on gloo train what one trains, spikes and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train.launch import in_two_processes

from . import distributed


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    found = in_two_processes("../pretrain/distributed.py", tmp_path)
    for name in distributed.JOBS:
        alone = distributed.job(tmp_path / f"{name} alone", name, 1)
        assert found[name]["steps"] == alone["steps"] > 42, "both reject, and both go back"
        expected = losses(tmp_path / f"{name} alone")
        close = 1e-3 if name == "ddp-muon" else 1e-4  # torch.optim.Muon orthogonalises in bfloat16
        assert losses(tmp_path / name) == pytest.approx(expected, abs=close)
        assert found[name]["bits"] == pytest.approx(alone["bits"], abs=1e-3)
        ours, theirs = (torch.load(tmp_path / folder / "weights.pt") for folder in (name, f"{name} alone"))
        assert all(torch.allclose(value, theirs[key], atol=10 * close) for key, value in ours.items())
