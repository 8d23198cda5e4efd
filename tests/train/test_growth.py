"""Growing adapters: budgets, optimizer groups, schedules, and the same bits after a broken-off run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.core.errors import CannotMix, MethodError, SettingsError
from pegbox.core.growth import growing
from pegbox.core.tuned import Tuned
from pegbox.train.growth import restarted

from . import tiny

METHODS = ("increlora", "triadaptlora")
SETTINGS: dict[str, Any] = {"rank": 3, "step": 2, "wait": 1, "every": 2}


def batch() -> dict[str, Tensor]:
    return tiny.COLLATE(tiny.rows(2))


def ranks(tuned: Tuned) -> dict[str, int]:
    return {path: graft.rank for path, graft in growing(tuned, "default").items()}


def walk(tuned: Tuned, steps: int, lr: float = 1e-2) -> torch.optim.Optimizer:
    """A loop of one's own."""
    torch.manual_seed(5)
    acts = pegbox.Callback(tuned)
    optimizer = torch.optim.AdamW(tuned.groups(lr))
    for step in range(steps):
        acts.before_step(step, steps, optimizer)
        (tuned(**batch()).loss + tuned.penalty()).backward()
        optimizer.step()
        acts.after_step(step, steps)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_and_never_passed(method: str) -> None:
    tuned = pegbox.tune(tiny.llama(), method, **SETTINGS)
    count = len(ranks(tuned))
    seen = []
    steps = 40
    acts, optimizer = pegbox.Callback(tuned), torch.optim.AdamW(tuned.groups(1e-2))
    for step in range(steps):
        before = ranks(tuned)
        acts.before_step(step, steps, optimizer)
        after = ranks(tuned)
        assert all(after[path] >= before[path] for path in before)
        assert (after == before) or (step > SETTINGS["wait"] and step % SETTINGS["every"] == 0)
        seen.append(sum(after.values()))
        (tuned(**batch()).loss + tuned.penalty()).backward()
        optimizer.step()
        acts.after_step(step, steps)
        optimizer.zero_grad()
    assert seen[0] == count
    assert max(seen) == seen[-1] == 3 * count
    assert tuned.method.complete  # type: ignore[attr-defined]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, tuned.trainable().values()))


def test_increlora_lets_the_top_layers_grow() -> None:
    tuned = pegbox.tune(tiny.llama(), "increlora", **SETTINGS | {"top": 2})
    walk(tuned, 3)
    grown = [path for path, rank in ranks(tuned).items() if rank > 1]
    assert len(grown) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_growth_is_a_group_and_leaves_the_others_alone(method: str) -> None:
    tuned = pegbox.tune(tiny.llama(), method, **SETTINGS)
    optimizer = walk(tuned, 2)
    states = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    groups = len(optimizer.param_groups)
    pegbox.Callback(tuned).before_step(2, 40, optimizer)
    assert len(optimizer.param_groups) == groups + 1
    new = optimizer.param_groups[-1]
    assert new["born"] == 2
    assert all(p not in optimizer.state for p in new["params"])
    for p, state in optimizer.state.items():
        assert all(torch.equal(value, states[id(p)][key]) for key, value in state.items())


@pytest.mark.parametrize("method", METHODS)
def test_growing_changes_nothing_under_a_fixed_scale(method: str) -> None:
    tuned = pegbox.tune(tiny.llama(), method, **SETTINGS | {"fixed_scale": True}).eval()
    walk(tuned, 2)
    before = tuned(**batch()).logits
    pegbox.Callback(tuned).before_step(2, 40, torch.optim.AdamW(tuned.groups(1e-2)))
    assert max(ranks(tuned).values()) > 1
    assert torch.allclose(tuned(**batch()).logits, before, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_what_has_grown(method: str, tmp_path: Path) -> None:
    tuned = pegbox.tune(tiny.llama(), method, **SETTINGS).eval()
    walk(tuned, 6)
    tuned.eval().save(tmp_path)
    again = pegbox.load(tiny.llama(), tmp_path)
    assert ranks(again) == ranks(tuned)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, tuned(**batch()).logits)
        want = tuned(**batch()).logits
        assert torch.allclose(tuned.merge()(**batch()).logits, want, atol=1e-4)


def test_a_group_goes_through_the_whole_schedule() -> None:
    share = restarted(lambda step: step / 100, born=60, steps=100)
    assert [share(step) for step in (0, 60, 80, 100)] == [0, 0, 0.5, 1]


STEPS = {"max_steps": 14, "warmup_steps": 2, "save_strategy": "steps", "save_steps": 7, "seed": 3}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_run_ends_in_the_same_bits(method: str, schedule: str, tmp_path: Path) -> None:
    def trained(folder: Path, resume: str | None = None) -> tuple[Tuned, Any]:
        torch.manual_seed(0)
        tuned = pegbox.tune(tiny.llama(), method, **SETTINGS)
        args = tiny.arguments(folder, lr_scheduler_type=schedule, **STEPS)
        trainer = pegbox.Trainer(tuned, "sft", args, train_dataset=tiny.rows(), data_collator=tiny.COLLATE)
        trainer.train(resume_from_checkpoint=resume)
        return tuned, trainer

    whole, first = trained(tmp_path / "a")
    again, second = trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-7"))
    assert ranks(whole) == ranks(again)
    want, have = whole.state(), again.state()
    assert want.keys() == have.keys()
    assert all(torch.equal(value, have[key]) for key, value in want.items())
    rates = [[group["lr"] for group in trainer.optimizer.param_groups] for trainer in (first, second)]
    assert rates[0] == rates[1]
    assert len(rates[0]) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_start_above_the_budget_is_refused(method: str) -> None:
    with pytest.raises(SettingsError, match=f"{method}.first is 4, .* above {method}.rank=3"):
        pegbox.tune(tiny.llama(), method, rank=3, first=4)


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    tuned = pegbox.tune(tiny.llama(), "increlora", **SETTINGS)
    with pytest.raises(MethodError, match="increlora takes on tensors while it trains"):
        pegbox.Callback(tuned).before_step(0, 10)
    args = tiny.arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    rows = tiny.rows()
    trainer = pegbox.Trainer(tuned, "sft", args, train_dataset=rows, eval_dataset=rows, data_collator=tiny.COLLATE)
    with pytest.raises(CannotMix, match="ReduceLROnPlateau"):
        trainer.train()


def test_factors_are_multiplied_out_and_train_on() -> None:
    tuned = pegbox.tune(tiny.llama(), "monarch", dense_after=0.5).train()
    acts, optimizer = pegbox.Callback(tuned), torch.optim.AdamW(tuned.groups(1e-3))
    steps = 4
    for step in range(steps):
        before = tuned(**batch()).logits.detach()
        acts.before_step(step, steps, optimizer)
        if step == 2:
            assert torch.allclose(tuned(**batch()).logits, before, atol=1e-4)
            assert {key.rpartition(".")[2] for key in tuned.trainable()} == {"whole"}
        tuned(**batch()).loss.backward()
        optimizer.step()
        acts.after_step(step, steps)
        optimizer.zero_grad()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, tuned.trainable().values()))


def test_a_run_that_is_resumed_after_that_ends_in_the_same_bits(tmp_path: Path) -> None:
    def trained(resume: str | None = None) -> Any:
        torch.manual_seed(0)
        tuned = pegbox.tune(tiny.llama(), "monarch", dense_after=0.4)
        args = tiny.arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=6, lr_scheduler_type="cosine")
        trainer = pegbox.Trainer(tuned, "sft", args, train_dataset=tiny.rows(), data_collator=tiny.COLLATE)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return tuned

    whole = trained().state()
    again = trained(str(tmp_path / "checkpoint-6")).state()
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    loaded = pegbox.load(tiny.llama(), tmp_path)
    assert loaded.adapter().method.dense_since == 4  # type: ignore[attr-defined]
