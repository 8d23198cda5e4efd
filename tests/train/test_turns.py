"""Tensors that train in turn, in every kind of loop: what the optimizer holds, and that a resumed run is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import pegbox
from pegbox.core import Tuned
from pegbox.core.errors import CannotMix, MethodError, SettingsError

from . import tiny
from .test_resume import assert_same, outcome, settings

LISA = {"active": 1, "period": 2}


def tuned_llama(blocks: int = 4, **changes: Any) -> Tuned:
    return pegbox.tune(tiny.llama(num_hidden_layers=blocks), "lisa", **LISA | changes)


@pytest.fixture(autouse=True)
def _four_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SIZES", {k: v for k, v in tiny.SIZES.items() if k != "num_hidden_layers"})


class Watch(TrainerCallback):
    """What trains and what the optimizer holds, after every step."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned, self.trained, self.held = tuned, [], []  # type: ignore[var-annotated]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.tuned.trainable()
        self.trained.append({key.split(".")[3] for key in now if ".layers." in key})
        held = kwargs["optimizer"].state
        self.held.append(sum(v.numel() for s in held.values() for k, v in s.items() if k != "step"))
        assert self.held[-1] == 2 * sum(p.numel() for p in now.values())


def plain(folder: Path, tuned: Tuned, *callbacks: TrainerCallback, **changes: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model=tuned,
        args=tiny.arguments(folder, **changes),
        train_dataset=tiny.rows(),
        data_collator=tiny.COLLATE,
        callbacks=[pegbox.Callback(tuned), *callbacks],
    )


def pegboxs(folder: Path, tuned: Tuned, *callbacks: TrainerCallback, **changes: Any) -> transformers.Trainer:
    return tiny.trainer(folder, tuned, callbacks=callbacks, **changes)


def drawn(tuned: Tuned, steps: int) -> list[set[str]]:
    """The block of each step, by its number."""
    method: Any = tuned.method
    return [{path.rpartition(".")[2] for path in method.drawn(tuned.anatomy.blocks, step)} for step in range(steps)]


@pytest.mark.parametrize("make", [plain, pegboxs])
def test_in_a_trainer(tmp_path: Path, make: Any) -> None:
    tuned = tuned_llama()
    watch = Watch(tuned)
    make(tmp_path, tuned, watch, max_steps=8, gradient_accumulation_steps=2, weight_decay=0.1).train()
    assert watch.trained == drawn(tuned, 8)
    assert len({frozenset(now) for now in watch.trained}) > 1
    assert max(watch.held) == min(watch.held)
    assert len(tuned.trainable()) == len(list(tuned.model.parameters()))  # nothing rests after the end


@pytest.mark.parametrize("make", [plain, pegboxs])
@pytest.mark.parametrize("at", [3, 4])  # within a period, and where another begins
def test_resumes_to_the_same_bits(tmp_path: Path, make: Any, at: int) -> None:
    saves = {"save_strategy": "steps", "save_steps": at, "max_steps": 8, "weight_decay": 0.1}
    whole = tuned_llama()
    make(tmp_path, whole, **saves).train()
    resumed, trainer = tuned_llama(), None
    trainer = make(tmp_path, resumed, watch := Watch(resumed), **saves)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert watch.trained == drawn(resumed, 8)[at:]
    assert all(torch.equal(value, whole.state()[key]) for key, value in resumed.state().items())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # between trl and transformers
def test_in_trl(tmp_path: Path) -> None:
    tuned = tuned_llama()
    chats = [{"text": f"say {i}"} for i in range(8)]
    args = SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="no",
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    watch = Watch(tuned)
    SFTTrainer(
        model=tuned,
        args=args,
        train_dataset=Dataset.from_list(chats),
        processing_class=tiny.tokenizer(),
        callbacks=[pegbox.Callback(tuned), watch],
    ).train()
    assert watch.trained == drawn(tuned, 4)


def test_all_blocks_are_full_fine_tuning(tmp_path: Path) -> None:
    ours, theirs = tuned_llama(active=4), pegbox.tune(tiny.llama(num_hidden_layers=4), "full")
    for name, tuned in {"ours": ours, "theirs": theirs}.items():
        pegboxs(tmp_path / name, tuned, weight_decay=0.1).train()
    assert all(torch.equal(value, theirs.state()[key]) for key, value in ours.state().items())


def test_killed_at_any_step_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base", tiny.llama(num_hidden_layers=4, attention_dropout=0.1))
    tiny.chat_file(base / "chat.jsonl")
    places = [["step", 4], ["step", 7], ["saving", 6]]  # at a draw, within a period, amid the writing
    plan = settings(base, tmp_path / "whole")
    for key in ("rank", "dropout"):
        del plan[key]
    plan |= {"method": "lisa", "active": 1, "period": 2, "save_steps": 2}
    jobs: list[Any] = [(plan, None)]
    for i, place in enumerate(places):
        again = plan | {"output": str(tmp_path / f"cut{i}")}
        jobs += [(again, place), (again | {"resume": "auto"}, None)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path / "jobs.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [0 if place is None else signal.SIGKILL for _, place in jobs], done.stderr
    for i in range(len(places)):
        assert_same(outcome(tmp_path / f"cut{i}"), outcome(tmp_path / "whole"))


def test_a_loop_must_give_its_optimizer_and_all_parameters() -> None:
    tuned = tuned_llama()
    acts = pegbox.Callback(tuned, save=False)
    with pytest.raises(MethodError, match=r"before_step\(step, steps, optimizer\)"):
        acts.before_step(0, 4)
    late = torch.optim.AdamW(p for p in tuned.parameters() if p.requires_grad)  # made after the first draw
    with pytest.raises(MethodError, match=r"the optimizer has 12 of 39, not 'base.model.layers.*tuned.groups"):
        acts.before_step(0, 4, late)
    acts.before_step(0, 4, torch.optim.AdamW(tuned.groups(1e-3)))
    acts.close()
    assert len(tuned.trainable()) == 39


def test_what_cannot_change_what_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        wanted: Any = SimpleNamespace(**{"fsdp": None, "deepspeed": None} | {setting: {"some": 1}})
        with pytest.raises(CannotMix, match=f"lisa trains its tensors in turn, which {name} cannot"):
            pegbox.Callback(tuned := tuned_llama(), save=False).on_init_end(wanted, None, None, model=tuned)  # type: ignore[arg-type]
    args = {"ddp_find_unused_parameters": False}
    plain(tmp_path, tuned_llama(), **args)  # one process has nothing to find
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    with pytest.raises(SettingsError, match="ddp_find_unused_parameters must be True, got False"):
        plain(tmp_path, tuned_llama(), **args)
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(SettingsError, match="'use_reentrant': False"):
        plain(tmp_path, tuned_llama(), **reentrant)


def test_with_gradient_checkpointing(tmp_path: Path) -> None:
    want, have = tuned_llama(), tuned_llama()
    pegboxs(tmp_path / "a", want).train()
    pegboxs(tmp_path / "b", have, activation_checkpointing=True).train()
    for key, value in have.state().items():
        assert torch.allclose(value, want.state()[key], atol=1e-6)


def test_a_run_broken_off_does_not_leave_tensors_at_rest(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    class Break(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise Broken

    tuned = tuned_llama()
    with pytest.raises(Broken):
        plain(tmp_path, tuned, Break()).train()
    watch = Watch(tuned)
    plain(tmp_path, tuned, watch, max_steps=6).train()
    assert watch.trained == drawn(tuned, 6)


def test_other_optimizers_are_freed_too() -> None:
    """Whatever keeps its state by parameter."""
    tuned = tuned_llama()
    acts = pegbox.Callback(tuned, save=False)
    optimizer = torch.optim.SGD(tuned.groups(1e-2), momentum=0.9)
    for step in range(6):
        acts.before_step(step, 6, optimizer)
        tuned(**tiny.COLLATE(tiny.rows(4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {id(p) for p in optimizer.state} == {id(p) for p in tuned.trainable().values()}
        assert all(isinstance(p, nn.Parameter) for p in optimizer.state)
