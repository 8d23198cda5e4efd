"""Whole runs from settings, on files in temporary folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pegbox
from pegbox.core.errors import DataError, ModelError, SettingsError
from pegbox.train import RunResult, hardware, run_settings, train

from . import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("bert"), tiny.bert().base_model)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sentences(count: int = 40) -> list[Any]:
    draw = random.Random(1)
    words = {"glad": ("good", "fine"), "sad": ("bad", "poor")}
    labels = [draw.choice(sorted(words)) for _ in range(count)]
    return [{"text": f"{draw.choice(words[label])} {i}", "label": label} for i, label in enumerate(labels)]


def run(model: Path, data: Path, output: Path, /, **changes: Any) -> RunResult:
    plain = {"model": str(model), "data": str(data), "output": str(output), "max_steps": 2, "batch_size": 4}
    return train(run_settings({"dtype": "float32"} | plain | changes))  # `auto` is another on every processor


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_head_has_a_rate_of_its_own(bert: Path, tmp_path: Path, method: str) -> None:
    """Whether the method trains it in place or a copy beside; another rate is another run."""
    data, out = jsonl(tmp_path / "mood.jsonl", sentences()), tmp_path / "out"
    more: dict[str, Any] = {"method": method, "learning_rate": 1e-3, "save_steps": 1}
    done = run(bert, data, out, head_rate=10, **more)
    rates = {name: group["lr"] for group in done.tuned.groups(1e-3) for name in group["names"]}
    heads = {name for name in rates if ".classifier." in name}
    assert len(heads) == 2
    assert {rates[name] for name in heads} == {1e-2}
    assert {rates[name] for name in rates.keys() - heads} == {1e-3}
    with pytest.raises(SettingsError, match=r"module_rates\.classifier"):
        run(bert, data, out, **more, max_steps=3, resume="auto")


def test_a_classifier_from_a_file_of_labels(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "mood.jsonl", [*sentences(), "{broken", {"text": "no label"}])
    out = tmp_path / "out"
    done = run(bert, data, out, valid_share=0.25, max_steps=None, epochs=6, learning_rate=1e-2, method="bitfit")
    told = capsys.readouterr().out
    for words in ("text classification: columns text, label used", "base in float32", "train (", "first row", "glad"):
        assert words in told
    assert done.objective == "sequence_classification"
    assert done.labels == ("glad", "sad")
    assert done.metrics["accuracy"] > 0.8
    assert done.tuned.config.id2label == {0: "glad", 1: "sad"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["data"]["rejected"] == 2
    assert manifest["metrics"] == done.metrics
    assert manifest["trained_parameters"] == done.trained == done.tuned.count()[0]
    assert manifest["settings"]["method"] == "bitfit"
    assert {"torch", "transformers"} <= manifest["packages"].keys()
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 2
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert (out / "tokenizer.json").is_file()


def test_a_warm_start_is_the_linear_probe(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "mood.jsonl", sentences(80))
    done = run(bert, data, tmp_path / "out", valid_share=0.25, warm_start=True, learning_rate=1e-8)
    assert "starts from a linear probe" in capsys.readouterr().out
    assert done.metrics["accuracy"] > 0.8  # two steps of next to nothing: what is known is the probe's


def test_a_warm_start_needs_a_classifier(llama: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "text.jsonl", [{"text": "one two three"}] * 8)
    with pytest.raises(SettingsError, match="warm_start"):
        run(llama, data, tmp_path / "out", warm_start=True)


def test_the_saved_adapter_is_the_trained_one(bert: Path, tmp_path: Path) -> None:
    """On a base whose head was drawn otherwise: the head travels with the adapter."""
    done = run(bert, jsonl(tmp_path / "mood.jsonl", sentences()), tmp_path / "out")
    torch.manual_seed(99)
    fresh = type(done.tuned.model).from_pretrained(bert, num_labels=2)
    again = pegbox.load(fresh, tmp_path / "out")
    batch = {"input_ids": torch.randint(0, 200, (2, 7))}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, done.tuned.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("rows", "objective"),
    [
        ([{"text": f"it is {i}"} for i in range(8)], "causal_lm"),
        ([{"instruction": f"say {i}", "output": "yes"} for i in range(8)], "sft"),
        ([{"text": f"it is {i}", "label": i / 3} for i in range(8)], "regression"),
        ([{"text": f"it is {i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(8)], "sequence_classification"),
        ([{"tokens": ["it", "is"], "ner_tags": ["O", "B-X"]} for _ in range(8)], "token_classification"),
    ],
)
def test_the_objective_follows_from_the_data(
    llama: Path, bert: Path, tmp_path: Path, rows: list[Any], objective: str
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", rows)
    done = run(llama if objective in ("causal_lm", "sft") else bert, data, tmp_path / "out", max_steps=1)
    assert done.objective == objective
    assert done.train_loss is not None


def test_full_fine_tuning_trains_a_new_head_in_place(bert: Path, tmp_path: Path) -> None:
    done = run(bert, jsonl(tmp_path / "mood.jsonl", sentences()), tmp_path / "out", method="full", learning_rate=1e-2)
    assert not done.tuned.adapter().copies
    assert done.trained == done.total


def test_packing_is_faster_to_say_no(llama: Path, tmp_path: Path) -> None:
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    with pytest.raises(ModelError, match="prompt_tuning puts tokens before every row"):
        run(llama, data, tmp_path / "a", packing=True, method="prompt_tuning")
    with pytest.raises(SettingsError, match="packing is for language modelling"):
        run(llama, jsonl(tmp_path / "m.jsonl", sentences()), tmp_path / "b", packing=True)


def test_a_stream_trains_and_needs_a_number_of_steps(llama: Path, tmp_path: Path) -> None:
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    assert run(llama, data, tmp_path / "out", streaming=True).steps == 2
    with pytest.raises(SettingsError, match="needs max_steps=N"):
        run(llama, data, tmp_path / "out2", streaming=True, max_steps=None)


def test_early_stopping_and_the_best(llama: Path, tmp_path: Path) -> None:
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    done = run(llama, data, tmp_path / "out", valid_share=0.3, eval_steps=1, patience=1, learning_rate=9.0, max_steps=9)
    assert done.steps < 9
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert done.metrics["loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)


def test_gradient_checkpointing_and_smoothing_by_settings(llama: Path, tmp_path: Path) -> None:
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    done = run(llama, data, tmp_path / "out", gradient_checkpointing=True, label_smoothing=0.1, max_length=64)
    assert done.steps == 2


def test_a_dry_run_stops_before_training(llama: Path, tmp_path: Path) -> None:
    done = run(llama, tiny.chat_file(tmp_path / "chat.jsonl"), tmp_path / "out", dry_run=True)
    assert done.steps == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "planned"


def test_tensorboard_gets_the_log(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.integration_utils as integrations

    seen: list[Any] = []
    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(integrations.TensorBoardCallback, "__init__", lambda self: None)
    monkeypatch.setattr(integrations.TensorBoardCallback, "on_train_begin", lambda *a, **k: None)
    monkeypatch.setattr(integrations.TensorBoardCallback, "on_train_end", lambda *a, **k: None)
    monkeypatch.setattr(integrations.TensorBoardCallback, "on_log", lambda *a, logs=None, **k: seen.append(logs))
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    run(llama, data, tmp_path / "out", report_to="tensorboard", logging_steps=1)
    assert any("loss" in logs for logs in seen)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "../lama"}, ModelError, "there is no model folder"),
        ({"data": "./chat.jsnl"}, DataError, "no such file"),
        ({"objective": "regression"}, SettingsError, "does not fit|fit no known"),
        ({"args": {"learning_rte": 1}}, SettingsError, "did you mean 'learning_rate'"),
        ({"patience": 2}, SettingsError, "patience needs held-out examples"),
        ({"valid_share": 0.3, "eval_steps": 2, "save_steps": 3}, SettingsError, "not a multiple"),
        ({"schedule": "cosin"}, SettingsError, "cosin"),
        ({"method": "lorra"}, SettingsError, "did you mean 'lora'"),
    ],
)
def test_a_mistake_is_named(
    llama: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    data = tiny.chat_file(tmp_path / "chat.jsonl")
    with pytest.raises((error, DataError), match=says):
        run(llama, data, tmp_path / "out", **changes)


def test_a_model_near_is_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        run(tmp_path / "models" / "lama", tiny.chat_file(tmp_path / "chat.jsonl"), tmp_path / "out")


def test_a_failed_run_says_so_in_its_manifest(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(llama, tmp_path / "missing.jsonl", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "no such file" in manifest["error"]


def test_the_dtype_follows_the_machine_and_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bf16_units", lambda: "AMX")
    assert hardware.choose_dtype("auto", trains_base=False)[0] == torch.bfloat16
    assert hardware.choose_dtype("auto", trains_base=True)[0] == torch.float32
    monkeypatch.setattr(hardware, "bf16_units", lambda: "")
    assert hardware.choose_dtype("auto", trains_base=False)[0] == torch.float32
    assert hardware.choose_dtype("float16", trains_base=True)[0] == torch.float16
