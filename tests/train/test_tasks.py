"""Rows of several tasks: from a column of the data to the adapter that asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pegbox
from pegbox.core.errors import AdapterError, CannotMerge, DataError, SettingsError
from pegbox.evaluate.evaluate import EvalSettings, evaluate
from pegbox.evaluate.export import export
from pegbox.evaluate.generate import generate
from pegbox.train import RunResult, run_settings, train

from . import tiny

SHORT: dict[str, Any] = {"max_new_tokens": 2, "template": "chatml"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "all.jsonl", ["up", "down"] * 10)


def written(path: Path, tasks: list[Any]) -> Path:
    answer = {"role": "assistant", "content": "x"}
    asked = [{"messages": [{"role": "user", "content": f"{k}"}, answer]} for k in range(20)]
    rows = [row | ({} if task is None else {"task": task}) for row, task in zip(asked, tasks, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, data: Path, output: Path, /, **changes: Any) -> RunResult:
    plain = {"model": str(model), "data": str(data), "output": str(output), "max_steps": 3, "batch_size": 4}
    small = {"method_settings": {"rank": 2, "heads": 2, "skills": 2, "tasks": 2}}
    return train(run_settings({"dtype": "float32", "method": "mhr"} | plain | small | changes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_column_says_the_tasks(model: Path, data: Path, tmp_path: Path, checkpointing: bool) -> None:
    fast = {"learning_rate": 1e-2}
    done = run(model, data, tmp_path / "out", gradient_checkpointing=checkpointing, valid_share=0.3, **fast)
    moved = [graft.z for graft in done.tuned.adapter().grafts.values()]  # type: ignore[union-attr]
    assert all(z.abs().max() > 0.01 for z in moved)  # type: ignore[operator, union-attr]
    assert done.metrics["loss"] > 0


def test_a_new_task_follows_on_the_others(model: Path, data: Path, tmp_path: Path) -> None:
    first = run(model, data, tmp_path / "all")
    few = {"method_settings": {"rank": 2, "heads": 2, "skills": 2, "train": "routing"}}
    alone = written(tmp_path / "alone.jsonl", [None] * 20)
    second = run(model, alone, tmp_path / "one", start_from=str(tmp_path / "all"), **few)
    theirs, ours = first.tuned.state(), second.tuned.state()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items() if not key.endswith(".z"))
    again = pegbox.load(tiny.llama(), tmp_path / "one")
    assert again.adapter().method.tasks == 1  # type: ignore[attr-defined]


def test_what_is_wrong_with_tasks_is_said(model: Path, data: Path, tmp_path: Path) -> None:
    some = written(tmp_path / "some.jsonl", ["up", None] * 10)
    with pytest.raises(DataError, match="has no task, and others have"):
        run(model, some, tmp_path / "a")
    with pytest.raises(SettingsError, match="packing=false"):
        run(model, data, tmp_path / "b", packing=True)
    none = written(tmp_path / "none.jsonl", [None] * 20)
    with pytest.raises(pegbox.PegboxError, match="rows must say theirs"):
        run(model, none, tmp_path / "c")
    run(model, data, tmp_path / "lora", method="lora", method_settings={"rank": 2})
    with pytest.raises(AdapterError, match="of lora, and mhr cannot go on from it"):
        run(model, data, tmp_path / "d", start_from=str(tmp_path / "lora"))


def test_experts_are_tasks_by_name(model: Path, data: Path, tmp_path: Path) -> None:
    for name in ("up", "down"):
        run(model, data, tmp_path / name, method="lora", method_settings={"rank": 2}, max_steps=1)
    experts = {"adapters": (str(tmp_path / "down"), str(tmp_path / "up"))}
    done = run(model, data, tmp_path / "all", method="meteora", method_settings=experts, max_steps=8)
    assert done.tuned.adapter().method.names == ("down", "up")  # type: ignore[attr-defined]
    other = written(tmp_path / "other.jsonl", ["up", "dwn"] * 10)
    with pytest.raises(DataError, match="knows no task 'dwn'; did you mean 'down'"):
        run(model, other, tmp_path / "x", method="meteora", method_settings=experts)


def test_names_of_tasks_are_kept(model: Path, data: Path, tmp_path: Path) -> None:
    """So that other data with other tasks in it numbers them alike, from the command line too."""
    small = {"rank": 2, "heads": 2, "skills": 2}
    done = run(model, data, tmp_path / "out", method_settings=small, learning_rate=0.1)
    assert (done.tuned.method.tasks, done.tuned.method.names) == (2, ("down", "up"))  # type: ignore[attr-defined]
    opened = {"adapter": str(tmp_path / "out"), "objective": "sft"}
    losses = {}
    for name in ("up", "down"):
        one = written(tmp_path / f"{name}.jsonl", [name] * 20)
        losses[name] = evaluate(EvalSettings(data=str(one), **opened)).after["nll"].mean
        answer = generate(tmp_path / "out", ["1"], task=name, **SHORT)
        assert answer == generate(tmp_path / "out", ["1"], task=str(("down", "up").index(name)), **SHORT)
    assert losses["up"] != losses["down"]
    with pytest.raises(SettingsError, match=r"knows several tasks \(down, up\), and prompt 1 names none"):
        generate(tmp_path / "out", ["1"], **SHORT)
    with pytest.raises(SettingsError, match="no task 'dwn'; did you mean 'down'"):
        generate(tmp_path / "out", ["1"], task="dwn", **SHORT)
    three = written(tmp_path / "three.jsonl", ["a", "b", "c", "d"] * 5)
    with pytest.raises(SettingsError, match=r"mhr\.tasks is 2, and the data names 4 tasks, a, b, c, d"):
        run(model, three, tmp_path / "x")


def test_a_task_for_a_model_without_tasks_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match="this model asks for none"):
        generate(model, ["1"], task="up", **SHORT)


def test_an_adapter_of_several_tasks_is_exported_as_it_is(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, tmp_path / "out", learning_rate=0.1)
    with pytest.raises(CannotMerge, match="format=adapter or format=peft exports it as it is"):
        export(tmp_path / "out", tmp_path / "merged")
    done = export(tmp_path / "out", tmp_path / "again", format="adapter")
    assert done.report.passed
    assert pegbox.load(tiny.llama(), tmp_path / "again").adapter().method.names == ("down", "up")  # type: ignore[attr-defined]


def test_a_run_does_not_train_what_only_heads_of_ones_own_read(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"heads of your own read the streams of mtlora.tasks"):
        run(model, data, tmp_path / "out", method="mtlora", method_settings={"tasks": ("up", "down")})
