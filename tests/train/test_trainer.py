from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import pegbox
from pegbox.core import Traits, Tuned
from pegbox.core.errors import AdapterError, SettingsError
from pegbox.data.collate import PadCollator
from pegbox.methods.lora import LoRA
from pegbox.objectives.objective import Batch

from . import tiny


def flat(tuned: Tuned) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tuned.state().items()}


def test_a_run_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    model = tiny.llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = tiny.trainer(tmp_path, pegbox.tune(model, "lora", rank=8), max_steps=20, learning_rate=5e-2)
    trained.train()
    assert tiny.losses(trained)[-1] < tiny.losses(trained)[0] - 0.5
    assert all(torch.equal(value, before[key]) for key, value in trained.tuned.detach().state_dict().items())


def test_accumulated_batches_of_unequal_size_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path, per_device_train_batch_size=12, train_sampling_strategy="sequential")
    parts = tiny.trainer(
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
    )
    whole.train()
    parts.train()
    assert tiny.losses(parts) == pytest.approx(tiny.losses(whole), abs=1e-5)


def test_groups_train_with_their_own_rates(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, pegbox.tune(tiny.llama(), "lora", rank=4, b_rate=16.0), learning_rate=1e-3)
    trained.train()
    rates = {name: group["initial_lr"] for group in trained.optimizer.param_groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if name.endswith(".b")} == {16e-3}
    assert {rate for name, rate in rates.items() if name.endswith(".a")} == {1e-3}


@dataclass(frozen=True, kw_only=True)
class Watched(LoRA):
    """LoRA that notes when it is called, has a penalty of 2 and an optimizer of its own."""

    traits: ClassVar[Traits] = LoRA.traits
    calls: ClassVar[list[Any]] = []

    def calibrate(self, tuned: Tuned, batches: Any) -> None:
        self.calls.append(("calibrate", next(iter(batches))["input_ids"].shape[0]))

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        self.calls.append(("before", step, steps))

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        assert all(p.grad is not None for p in tuned.trainable().values())
        self.calls.append(("after", step, steps))

    def penalty(self, tuned: Tuned) -> Tensor | None:
        return torch.tensor(2.0)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        return torch.optim.SGD(groups)


def test_a_method_acts_at_its_times(tmp_path: Path) -> None:
    Watched.calls.clear()
    tuned = pegbox.tune(tiny.llama(), Watched(rank=4))
    trained = tiny.trainer(tmp_path, tuned, max_steps=2, gradient_accumulation_steps=2)
    trained.train()
    assert Watched.calls == [
        ("calibrate", 4),
        *[(when, step, 2) for step in (0, 1) for when in ("before", "after")],
    ]
    assert isinstance(trained.optimizer.optimizer, torch.optim.SGD)
    line = trained.state.log_history[0]
    assert line["loss_penalty"] == 2.0
    assert line["loss"] == pytest.approx(line["loss_nll"] + 2.0, abs=1e-5)


def test_a_function_is_an_objective(tmp_path: Path) -> None:
    def tenth(model: Any, batch: Batch) -> dict[str, Tensor]:
        return {"tenth": model(**batch).loss / 10}

    plain = tiny.trainer(tmp_path, max_steps=1)
    scaled = tiny.trainer(tmp_path, objective=tenth, max_steps=1, eval_dataset=tiny.rows(5))
    plain.train()
    scaled.train()
    assert 10 * tiny.losses(scaled)[0] == pytest.approx(tiny.losses(plain)[0], rel=1e-5)
    assert set(scaled.evaluate()) >= {"eval_loss"}


def test_evaluation_measures_the_whole_set_and_own_metrics(tmp_path: Path) -> None:
    trained = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.rows(7),
        metrics=lambda found: {"tokens": float(found["tokens"].sum())},
        per_device_eval_batch_size=2,
    )
    measured = trained.evaluate()
    rows = tiny.rows(7)
    with torch.no_grad():
        each = [(trained.tuned(**tiny.COLLATE([r])).loss, sum(x != -100 for x in r.labels[1:])) for r in rows]
    tokens = sum(n for _, n in each)
    assert measured["eval_tokens"] == tokens
    assert measured["eval_loss"] == pytest.approx(float(sum(loss * n for loss, n in each)) / tokens, abs=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "series", "prompt_tuning", "full"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, method: str, reentrant: bool) -> None:
    plain = tiny.trainer(tmp_path, pegbox.tune(tiny.llama(), method), max_steps=2)
    saving = tiny.trainer(
        tmp_path,
        pegbox.tune(tiny.llama(), method),
        max_steps=2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    plain.train()
    saving.train()
    assert tiny.losses(saving) == pytest.approx(tiny.losses(plain), abs=1e-6)
    embedding = saving.tuned.model.get_input_embeddings()
    assert not embedding._forward_hooks


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_a_compiled_run_is_the_same_run_in_one_graph(tmp_path: Path) -> None:
    collate = PadCollator(tiny.PAD, pad_to_multiple_of=32)
    plain = tiny.trainer(tmp_path, max_steps=3, data_collator=collate)
    compiled = tiny.trainer(
        tmp_path, max_steps=3, data_collator=collate, torch_compile=True, torch_compile_backend="aot_eager"
    )
    plain.train()
    counters.clear()
    compiled.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert tiny.losses(compiled) == pytest.approx(tiny.losses(plain), abs=1e-4)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    trained.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    held = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert held == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "pegbox.json",
    }
    again = pegbox.load(tiny.llama(), tmp_path / "checkpoint-4")
    assert all(torch.equal(value, again.state()[key]) for key, value in trained.tuned.state().items())


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([1, 3, 2, 2, 2, 0])
    trained = tiny.trainer(
        tmp_path,
        max_steps=5,
        eval_dataset=tiny.rows(6),
        metrics=lambda found: {"chosen": float(next(scores))},
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="chosen",
        greater_is_better=True,
    )
    trained.train()
    seen = [line["eval_loss"] for line in trained.state.log_history if "eval_loss" in line]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert trained.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trained.evaluate()["eval_loss"] == seen[1] != seen[-1]


def test_another_method_in_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, save_strategy="steps", save_steps=4)
    trained.train()
    other = tiny.trainer(tmp_path, pegbox.tune(tiny.llama(), "miss", rank=4))
    with pytest.raises(AdapterError, match="holds a lora adapter, this run trains miss"):
        other._load_from_checkpoint(str(tmp_path / "checkpoint-4"))


def test_unknown_objective_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'causal_lm'"):
        tiny.trainer(tmp_path, objective="causal-llm")


def test_label_smoothing_reaches_the_objective(tmp_path: Path) -> None:
    plain, smooth = (tiny.trainer(tmp_path, max_steps=1, label_smoothing_factor=s) for s in (0.0, 0.2))
    plain.train()
    smooth.train()
    assert tiny.losses(smooth) != tiny.losses(plain)
