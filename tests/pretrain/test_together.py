"""Two processes make what one makes: the first works on the texts, both train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pegbox.core.errors import SettingsError
from pegbox.pretrain.run import pretrain
from pegbox.pretrain.settings import recipe
from pegbox.pretrain.together import alone

from . import small_recipe


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    root = small_recipe.folder(tmp_path / "root")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(Path(__file__).with_name("in_processes.py")), str(root), str(tmp_path / "two")]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.count("stories: 40 of 40") == 1
    pretrain(recipe(small_recipe.values(tmp_path / "one")), root)
    two, one = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert all(torch.allclose(two[key], one[key], atol=1e-5) for key in one)
    seals = (tmp_path / "two").glob("*/checkpoint-*/pegbox.json")
    assert {json.loads(seal.read_text())["identity"]["processes"] for seal in seals} == {2}


def test_processes_of_another_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="by torchrun"):
        alone("a piece", print)
