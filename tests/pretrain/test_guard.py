"""Spikes are rejected or gone back before, and leave no trace."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import Diverged
from pegbox.pretrain.guard import History, Skip, position, spike
from pegbox.pretrain.settings import GuardSettings
from pegbox.train import checkpoint

from .fitting import Counting, run, same, settings


def spikes(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "spikes.jsonl").read_text().splitlines()]


def test_what_a_spike_is() -> None:
    rule = GuardSettings(window=4, sigmas=3, norm=5)
    history = History([2.0, 2.2, 1.8, 2.0], [1.0, 1.1, 0.9, 1.0])
    assert spike(history, 2.3, 4.9, rule) is None
    assert "loss 2.5 against 2 " in str(spike(history, 2.5, 1.0, rule))
    assert "norm 5.1 against a median of 1" in str(spike(history, 2.0, 5.1, rule))
    assert spike(History(history.losses), 2.0, 5.1, rule) is None, "norms are counted anew"
    young = History([2.0] * 3, [1.0] * 3)
    assert spike(young, 99.0, 99.0, rule) is None, "too few to compare with"
    assert spike(young, math.nan, 1.0, rule)
    assert spike(young, 1.0, math.inf, rule)


def test_rows_are_a_pure_function_of_skips() -> None:
    skips = [Skip(3, 2), Skip(5, 1)]
    assert [position(row, 2, skips) for row in range(12)] == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 16, 17]


def test_a_clean_run_is_left_alone(tmp_path: Path) -> None:
    guarded = run(settings(tmp_path / "guarded"), Counting())
    alone = run(settings(tmp_path / "alone", **{"guard.active": False}), Counting())
    assert same(guarded, alone)
    assert spikes(tmp_path / "guarded") == []


def test_a_rejected_batch_leaves_no_trace_but_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    guarded = run(settings(tmp_path / "noisy"), Counting(noisy=[20]), said.append)
    assert same(guarded, run(settings(tmp_path / "clean"), Counting(left_out=[20])))
    assert guarded.steps == 41, "one iteration more, as many updates"
    (line,) = spikes(tmp_path / "noisy")
    assert (line["step"], line["did"]) == (21, "rejected")
    assert any(told.startswith("spike at step 21: loss") and told.endswith("batch rejected") for told in said)


def test_going_back_restores_weights_optimizer_and_schedule_and_skips_data(tmp_path: Path) -> None:
    """Batches 20 and 21 are rejected; 22 goes back to the weights after 16 updates and skips 23 to 25."""
    rarely = {"train.save_steps": 100}
    guarded = run(settings(tmp_path / "noisy", **rarely), Counting(noisy=range(20, 25)))
    assert same(guarded, run(settings(tmp_path / "clean", **rarely), Counting(left_out=range(16, 26))))
    assert guarded.steps == 40 + 3 + 4
    lines = spikes(tmp_path / "noisy")
    assert [line["did"] for line in lines] == ["rejected", "rejected", "went back"]
    assert (lines[2]["updates"], lines[2]["skipped"]) == (16, 3)
    assert same(guarded, run(settings(tmp_path / "again", **rarely), Counting(noisy=range(20, 25)))), (
        "the same on replay"
    )


def test_before_the_first_update_there_is_something_to_go_back_to(tmp_path: Path) -> None:
    changes = {"guard.window": 4, "guard.sigmas": 3, "guard.rejects": 0}
    changes |= {"guard.snapshot": 100, "train.save_steps": 100}
    guarded = run(settings(tmp_path / "noisy", **changes), Counting(noisy=[12]))
    assert same(guarded, run(settings(tmp_path / "clean", **changes), Counting(left_out=range(16))))


def test_it_gives_up_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    made = settings(tmp_path, **{"guard.rollbacks": 1, "guard.rejects": 1})
    with pytest.raises(Diverged, match=r"step 2\d: loss .*going back 1 times did not help.*learning_rate"):
        run(made, Counting(noisy=range(20, 60)))
    last = checkpoint.last_complete(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-20"
    assert run(made, Counting(noisy=[20])).steps == 41, "and goes on from it where the data are mended"


def test_a_run_resumed_amid_spikes_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Checkpoints lie between the batches that are rejected, and after what was skipped."""
    data, often = Counting(noisy=[*range(20, 25), 33, 34]), {"train.save_steps": 1, "train.keep": 99}
    whole = run(settings(tmp_path / "whole", **often), data)
    lines = spikes(tmp_path / "whole")
    for step in (21, 22, 23, 30):
        part = tmp_path / str(step)
        name = f"checkpoints/checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / name, part / name)
        (part / "spikes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert same(run(settings(part, **often), data), whole), step
        assert spikes(part) == lines
