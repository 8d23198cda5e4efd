"""Two processes on gloo reach what one reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pegbox

from . import distributed, distributed_starts, tiny
from .launch import in_two_processes


def test_two_processes_reach_the_loss_of_one(tmp_path: Path) -> None:
    found = in_two_processes("distributed.py", tmp_path)
    assert found["ddp"]["as"] == "DistributedDataParallel"
    assert found["fsdp2"]["as"] == "FSDPTuned"
    for name, (method, _) in distributed.JOBS.items():
        alone = distributed.job(tmp_path / f"{name} alone", method, 1)
        assert found[name]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert found[name]["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert found[f"{name} resumed"]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        ours, theirs = (pegbox.load(tiny.llama(), tmp_path / folder) for folder in (name, f"{name} alone"))
        for key, value in ours.state().items():
            assert torch.allclose(value, theirs.state()[key], atol=1e-3), key
        held = {path.name for path in (tmp_path / name / "checkpoint-10").iterdir()}
        assert not held & {"pytorch_model_fsdp.bin", "model.safetensors"}  # no base


def test_two_processes_start_from_what_the_first_has_found(tmp_path: Path) -> None:
    found = in_two_processes("distributed_starts.py", tmp_path)
    for method in distributed_starts.METHODS:
        settings, values = distributed_starts.started(method, seed=0)
        other, _ = distributed_starts.started(method, seed=1)
        assert found[method]["same"]
        assert found[method]["settings"] == repr(settings)
        assert found[method]["values"].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(torch.tensor(found[method]["values"][key]), torch.tensor(value))
        assert method == "lora_ga" or other != settings, "alone they find different ones"
    assert found["steps"] == 2
