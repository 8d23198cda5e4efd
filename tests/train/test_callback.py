"""Pegbox's methods inside trainers that know nothing of Pegbox."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import pegbox
from pegbox.core import Traits, Tuned
from pegbox.core.errors import MethodError
from pegbox.methods.lora import LoRA

from . import tiny

METHODS = {"lora": {"rank": 4}, "series": {"bottleneck": 4}, "full": {}}  # by weight, by output, by selection


def plain(folder: Path, tuned: Tuned, **changes: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model=tuned,
        args=tiny.arguments(folder, **changes),
        train_dataset=tiny.rows(),
        data_collator=tiny.COLLATE,
        callbacks=[pegbox.Callback(tuned)],
    )


def same(a: Tuned, b: Tuned) -> bool:
    ours, theirs = a.state(), b.state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def loaded(folder: Path, **model: Any) -> Tuned:
    return pegbox.load(tiny.llama(**model), folder)


@pytest.mark.parametrize("method", METHODS)
def test_in_a_plain_trainer(tmp_path: Path, method: str) -> None:
    """Learns, saves adapters, resumes to the same bits; a tied head does not get in the way."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    tuned = pegbox.tune(tiny.llama(tie_word_embeddings=True), method, **METHODS[method])
    whole = plain(tmp_path, tuned, **saves)
    start = {key: value.clone() for key, value in tuned.state().items()}
    whole.train()
    assert any(not torch.equal(value, start[key]) for key, value in tuned.state().items())
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert same(loaded(folder, tie_word_embeddings=True), tuned)
    if method != "full":  # what the trainer itself wrote has no base in it
        small = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size
        assert small < sum(p.numel() for p in tuned.model.parameters())
    again = plain(tmp_path, pegbox.tune(tiny.llama(tie_word_embeddings=True), method, **METHODS[method]), **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(again.model, tuned)


def test_a_plain_trainer_evaluates(tmp_path: Path) -> None:
    tuned = pegbox.tune(tiny.llama(), "lora", rank=4)
    assert "eval_loss" in plain(tmp_path, tuned).evaluate(tiny.rows(4))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # between trl and transformers
@pytest.mark.parametrize("method", METHODS)
def test_in_trl(tmp_path: Path, method: str) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(8)
    ]
    tuned = pegbox.tune(tiny.llama(), method, **METHODS[method])
    start = {key: value.clone() for key, value in tuned.state().items()}
    args = SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=tuned,
        args=args,
        train_dataset=Dataset.from_list(chats),
        processing_class=tiny.tokenizer(),
        callbacks=[pegbox.Callback(tuned)],
    )
    trainer.train()
    assert len(tiny.losses(trainer)) == 2
    assert any(not torch.equal(value, start[key]) for key, value in tuned.state().items())
    assert same(loaded(tmp_path / "checkpoint-2"), tuned)


@dataclass(frozen=True, kw_only=True)
class Noting(LoRA):
    traits: ClassVar[Traits] = LoRA.traits
    calls: ClassVar[list[Any]] = []

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        self.calls.append(("before", step, steps))

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        self.calls.append(("after", step, steps))


STEPS = [("before", 0, 2), ("after", 0, 2), ("before", 1, 2), ("after", 1, 2)]


def test_steps_are_told_in_a_plain_trainer(tmp_path: Path) -> None:
    Noting.calls.clear()
    plain(tmp_path, pegbox.tune(tiny.llama(), Noting(rank=4)), max_steps=2, gradient_accumulation_steps=2).train()
    assert Noting.calls == STEPS


def test_in_a_loop_of_ones_own() -> None:
    Noting.calls.clear()
    tuned = pegbox.tune(tiny.llama(), Noting(rank=4)).train()
    acts = pegbox.Callback(tuned)
    optimizer = torch.optim.AdamW(tuned.groups(lr=1e-2))
    losses = []
    for step in range(2):
        acts.before_step(step, 2)
        loss = tuned(**tiny.COLLATE(tiny.rows(8))).loss + tuned.penalty()
        loss.backward()
        optimizer.step()
        acts.after_step(step, 2)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert Noting.calls == STEPS


@dataclass(frozen=True, kw_only=True)
class Calibrating(LoRA):
    traits: ClassVar[Traits] = LoRA.traits

    def calibrate(self, tuned: Tuned, batches: Any) -> None:
        assert list(batches)


def test_a_method_that_needs_data_says_so(tmp_path: Path) -> None:
    tuned = pegbox.tune(tiny.llama(), Calibrating(rank=4))
    trainer = plain(tmp_path, tuned, max_steps=1)
    with pytest.raises(MethodError, match="looks at data before training"):
        trainer.train()
    acts = next(c for c in trainer.callback_handler.callbacks if isinstance(c, pegbox.Callback))
    acts.calibrate([tiny.COLLATE(tiny.rows(2))])
    trainer.train()


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    tuned = pegbox.tune(tiny.llama(), "lora", rank=4)
    with pytest.raises(MethodError, match="pass model=tuned"):
        transformers.Trainer(model=tuned.model, args=tiny.arguments(tmp_path), callbacks=[pegbox.Callback(tuned)])
