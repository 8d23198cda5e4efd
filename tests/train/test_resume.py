"""An interrupted run, resumed, is the uninterrupted run."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pegbox.core.errors import SettingsError
from pegbox.train import checkpoint, run_settings, train
from pegbox.train.interrupt import Interrupt, Interrupted
from pegbox.train.progress import Progress

from . import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model_folder(folder, tiny.llama(attention_dropout=0.1))
    tiny.chat_file(folder / "chat.jsonl")
    return folder


def settings(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"model": str(base), "data": str(base / "chat.jsonl"), "output": str(output)}
    plain |= {"method": "lora", "rank": 4, "dropout": 0.1, "max_length": 128, "learning_rate": 1e-2}
    plain |= {"batch_size": 2, "gradient_accumulation": 2, "save_steps": 3, "logging_steps": 2, "max_steps": 8}
    return plain | {"keep": 9} | changes


def outcome(output: Path) -> dict[str, Any]:
    """Weights, optimizer state and logged numbers."""
    optimizer = torch.load(output / "checkpoint-8" / "optimizer.pt", weights_only=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(output / "adapter_model.safetensors"),
        "optimizer": {f"{i}.{k}": v for i, state in optimizer["state"].items() for k, v in state.items()},
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "log": [line for line in lines if "train_runtime" not in line],
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for part in ("weights", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][key]) for key, value in ours[part].items()), part
    assert ours["log"] == theirs["log"]
    assert ours["rates"] == theirs["rates"]


def test_a_finished_run_takes_no_step_more(base: Path, tmp_path: Path) -> None:
    """The loop of transformers takes one before it looks at the count."""
    train(run_settings(settings(base, tmp_path)))
    before = outcome(tmp_path)
    train(run_settings(settings(base, tmp_path, resume="auto")))
    assert_same(outcome(tmp_path), before)
    assert not (tmp_path / "checkpoint-9").exists()


def test_killed_at_any_step_a_run_resumes_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    """With dropout, accumulated gradients, shuffled rows, packed and loose, and several epochs."""
    kills = {"loose": [["step", 4], ["saving", 6]], "packed": [["step", 1], ["step", 7]]}
    jobs: list[Any] = []
    for kind, places in kills.items():
        more = {"packing": kind == "packed"}
        jobs.append((settings(base, tmp_path / kind, **more), None))
        for i, place in enumerate(places):
            jobs.append((settings(base, tmp_path / f"{kind}{i}", **more), place))
            jobs.append((settings(base, tmp_path / f"{kind}{i}", **more, resume="auto"), None))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path / "jobs.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [0 if place is None else signal.SIGKILL for _, place in jobs], done.stderr
    for kind, places in kills.items():
        for i in range(len(places)):
            assert_same(outcome(tmp_path / f"{kind}{i}"), outcome(tmp_path / kind))
    assert not list(tmp_path.glob("*/.unfinished/*"))


@pytest.mark.parametrize("method", ["eva", "lora_ga", "diffora"])
def test_what_was_found_before_training_is_not_looked_for_again(base: Path, tmp_path: Path, method: str) -> None:
    """Ranks, sites, factors: a resumed run has them from its checkpoint, the same bits after it."""
    own = {"method.search_steps": 4} if method == "diffora" else {"method.start_settings": {"batches": 4}}
    given = settings(base, tmp_path, method=method, **own) | {"rank": 2}
    train(run_settings(given))
    before = outcome(tmp_path)
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    train(run_settings(given | {"resume": "auto"}))
    assert_same(outcome(tmp_path), before)


def press_ctrl_c(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    if state.global_step == 2:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_a_checkpoint_and_ends_with_code_130(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run_settings(settings(base, tmp_path / "whole")))
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", press_ctrl_c)
        with pytest.raises(Interrupted) as stopped:
            train(run_settings(settings(base, tmp_path / "cut")))
    assert stopped.value.code == 130
    assert "interrupted after step 2 of 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"] == "interrupted"
    train(run_settings(settings(base, tmp_path / "cut", resume="auto")))
    assert_same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"] == "done"


def test_the_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # the default's, or "ignore" in a job that a shell runs in the background
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    train(run_settings(settings(base, output, max_steps=3)))
    return output


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "miss", "dropout": 0.0}, "method was 'lora' and is 'miss'"),
        ({"rank": 2}, "method.rank was 4 and is 2"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001"),
        ({"schedule": "linear"}, "schedule was 'cosine' and is 'linear'"),
        ({"limit": 7}, "data was '"),
        ({"packing": True}, "packing was False and is True"),
    ],
)
def test_another_run_does_not_go_on_from_it(base: Path, finished: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match="was made by another run") as refused:
        train(run_settings(settings(base, finished, max_steps=3, resume="auto") | changes))
    assert named in str(refused.value)


def test_a_folder_with_checkpoints_is_not_written_over(base: Path, finished: Path) -> None:
    with pytest.raises(SettingsError, match="resume=auto"):
        train(run_settings(settings(base, finished, max_steps=3)))


def sealed(output: Path, step: int) -> Path:
    folder = checkpoint.staging(output) / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(bytes(100))
    return checkpoint.seal(folder, output, {"identity": {}})


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = (sealed(tmp_path, step) for step in (9, 10, 100))
    (third / "optimizer.pt").write_bytes(bytes(60))
    (second / checkpoint.SEAL).unlink()
    with caplog.at_level(logging.WARNING, "pegbox"):
        assert checkpoint.last_complete(tmp_path) == first
    assert "optimizer.pt has 60 bytes of 100" in caplog.text
    with pytest.raises(SettingsError, match="no complete checkpoint"):
        checkpoint.read_seal(third)
    (first / "optimizer.pt").unlink()
    assert checkpoint.last_complete(tmp_path) is None


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    made = [sealed(tmp_path, step) for step in (1, 2, 10, 11)]
    checkpoint.rotate(tmp_path, 2, str(made[0]))
    assert checkpoint.checkpoints(tmp_path) == [made[0], made[2], made[3]]
