"""Training from scratch: it learns, resumes to the same bits, and refuses what cannot be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pegbox.core.errors import SettingsError
from pegbox.pretrain.engine import arguments, steps
from pegbox.train.interrupt import Interrupted
from pegbox.train.progress import Progress

from .fitting import HELD_OUT, ROWS, Counting, run, same, settings


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_by_the_schedule_and_says_how_well(tmp_path: Path) -> None:
    made = settings(tmp_path, **{"train.warmup": 10, "train.save_steps": 50})
    found = run(made, Counting())
    lines = log(tmp_path)
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert max(rates) == rates[10] == 5e-3
    assert rates[-1] == pytest.approx(5e-4, rel=0.03), "the last step's; the schedule ends at a tenth"
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(5.6, abs=0.2)
    assert losses[-1] < 2
    measured = [line for line in lines if "eval_bits_digits" in line]
    assert [line["step"] for line in measured] == [20, 40]
    assert found.bits == {name: measured[-1][f"eval_bits_{name}"] for name in HELD_OUT}
    assert (found.steps, found.tokens, lines[-1]["epoch"]) == (40, 40 * ROWS * 24, 1)
    assert found.tokens_per_second > 0
    assert found.model.config.eos_token_id == 1
    again = run(made, Counting())
    assert same(again, found), "a finished run is not trained on"
    assert (again.steps, again.tokens_per_second) == (40, 0)


def test_what_is_kept_in_bfloat16_is_what_was_measured(tmp_path: Path) -> None:
    plain = run(settings(tmp_path), Counting())
    rounded = run(settings(tmp_path, **{"train.saved": "bfloat16"}), Counting())
    for name, value in rounded.model.state_dict().items():
        assert value.equal(plain.model.state_dict()[name].bfloat16().float()), name
    assert rounded.steps == plain.steps, "the same checkpoint serves both"
    assert rounded.bits != plain.bits
    assert rounded.bits == pytest.approx(plain.bits, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.dtype": "bfloat16"},
        {"train.optimizer": "muon"},
        {"train.checkpointing": True},
        {"train.schedule": "wsd"},
        {"model.shrink": 0.1, "train.accumulate": 2, "train.batch": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_of_training_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = run(settings(tmp_path, **{"train.save_steps": 50} | changes), Counting(), held_out={})
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[-1] < 2
    assert all(p.dtype == torch.float32 for p in found.model.parameters())


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    ways = {"whole": {}, "parts": {"train.batch": 1, "train.accumulate": 4}}
    plain = {"train.save_steps": 50, "train.steps": 10}
    one, other = (run(settings(tmp_path / k, **plain | v), Counting(), held_out={}) for k, v in ways.items())
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


KILLED = {
    "adamw": {"train.accumulate": 2, "train.batch": 2, "train.dropout": 0.1, "model.shrink": 0.5},
    "muon": {"train.optimizer": "muon", "train.dtype": "bfloat16"},
}


def test_killed_at_any_step_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """With dropout, accumulated batches, a spike, and evaluation."""
    script = str(Path(__file__).with_name("killed_engine.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [0, signal.SIGKILL, signal.SIGKILL, 0] * len(KILLED), done.stderr[-3000:]
    for name in KILLED:
        whole, cut = (torch.load(tmp_path / f"{name}-{kind}.pt") for kind in ("whole", "cut"))
        assert all(torch.equal(value, cut[key]) for key, value in whole.items())
        timeless = [
            [{k: v for k, v in line.items() if not k.endswith("second") and "runtime" not in k} for line in log(folder)]
            for folder in (tmp_path / f"{name}-whole", tmp_path / f"{name}-cut")
        ]
        assert [line for line in timeless[0] if "total_flos" not in line] == [
            line for line in timeless[1] if "total_flos" not in line
        ]
    assert not list(tmp_path.glob("*/checkpoints/.unfinished/*"))


def test_ctrl_c_stops_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)

    whole = run(settings(tmp_path / "whole"), Counting())
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", press)
        with pytest.raises(Interrupted):
            run(settings(tmp_path / "cut"), Counting())
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-7").is_dir()
    assert same(run(settings(tmp_path / "cut"), Counting()), whole)


def test_a_damaged_checkpoint_is_passed_over_and_another_run_refused(tmp_path: Path) -> None:
    whole = run(settings(tmp_path), Counting())
    (tmp_path / "checkpoints" / "checkpoint-40" / "optimizer.pt").write_bytes(b"")
    assert same(run(settings(tmp_path), Counting()), whole)
    with pytest.raises(SettingsError, match=r"was made by another run.*train.clip was 1.0 and is 2.0"):
        run(settings(tmp_path, **{"train.clip": 2.0}), Counting())
    with pytest.raises(SettingsError, match=r"data was None and is 'other'"):
        run(settings(tmp_path), Counting(), facts={"data": "other"})


def test_steps_are_given_or_counted_from_passes() -> None:
    training = settings("", **{"train.steps": None, "train.epochs": 1.5, "train.batch": 4, "train.accumulate": 2}).train
    assert steps(training, 160) == 30
    assert steps(training, 160, 2) == 15
    with pytest.raises(SettingsError, match=r"1\.5 passes over 4 rows are less than one step of 8"):
        steps(training, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.warmup": 40}, "train.warmup takes 40 of 40 steps"),
        ({"train.schedule": "wsd", "train.warmup": 0.5, "train.decay": 0.6}, "train.warmup 20 and train.decay 24"),
    ],
)
def test_a_schedule_must_fit(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        arguments(settings("out", **changes), 160, evaluates=False)
