"""Preferences in a comparison and an evaluation: chosen by reward accuracy, with the settings that were learned by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import SettingsError
from pegbox.evaluate.compare import compare
from pegbox.evaluate.compare_settings import compare_settings
from pegbox.evaluate.evaluate import EvalSettings, evaluate
from pegbox.train import run_settings, train


def pairs(path: Path) -> Path:
    rows = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no " * (1 + i % 2)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def values(bases: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(bases / "llama"),
        "data": str(pairs(tmp_path / "pairs.jsonl")),
        "output": str(tmp_path / "out"),
        "batch_size": 4,
        "max_length": 96,
        "dtype": "float32",
        "objective.beta": 0.5,
        "objective": "dpo",
    }


def test_a_comparison_chooses_by_reward_accuracy(values: dict[str, Any]) -> None:
    made = {"methods": ["lora", "full"], "trials": 2, "seeds": 1, "max_steps": 4, "valid_share": 0.25}
    settings = compare_settings(values | made | {"objective.precompute": True})
    compare(settings)
    results = json.loads((Path(values["output"]) / "results.json").read_text())
    assert "reward_accuracy" in json.dumps(results)


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_training_rows_are_packed_and_the_others_are_not(values: dict[str, Any], objective: str) -> None:
    data = Path(values["data"])
    if objective == "sft":
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        lines = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        del values["objective.beta"]
    made = {"methods": ["lora"], "trials": 1, "seeds": 1, "max_steps": 2, "valid_share": 0.25, "packing": True}
    comparison = compare(compare_settings(values | made | {"objective": objective}))
    assert "lora" in json.dumps(json.loads((Path(values["output"]) / "results.json").read_text()))
    assert comparison is not None


def test_a_comparison_with_a_method_that_leaves_no_reference(values: dict[str, Any]) -> None:
    made = {"methods": ["lora", "full"], "trials": 1, "seeds": 1, "max_steps": 2, "valid_share": 0.25}
    with pytest.raises(SettingsError, match=r"full trains the base's own tensors; set objective.precompute=true"):
        compare(compare_settings(values | made))


def test_an_adapter_is_measured_by_the_settings_it_learned_by(values: dict[str, Any], tmp_path: Path) -> None:
    run = train(
        run_settings(values | {"method": "lora", "valid": values["data"], "max_steps": 6, "learning_rate": 1e-2})
    )
    found = evaluate(EvalSettings(adapter=values["output"], data=values["data"], max_length=96))
    assert found.after["reward_margin"].mean == pytest.approx(run.metrics["reward_margin"], rel=1e-3)
    assert found.before["reward_margin"].mean == pytest.approx(0, abs=1e-6)
    other = EvalSettings(adapter=values["output"], data=values["data"], max_length=96, objective_settings={"beta": 1.0})
    assert evaluate(other).after["reward_margin"].mean == pytest.approx(2 * run.metrics["reward_margin"], rel=1e-3)
