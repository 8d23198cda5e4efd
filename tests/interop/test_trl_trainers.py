"""Methods of Pegbox in TRL's SFT, DPO and GRPO trainers: what changes, what is saved, what is gone on from."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import pegbox
from pegbox.core import Tuned
from pegbox.core.errors import CannotDisable, MethodError
from train import tiny

from .tiny_trl import (
    COMMON,
    KEEP_THE_BASE,
    METHODS,
    assert_only_the_adapter_changed,
    assert_saved,
    base,
    snapshot,
    tune,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PAIRS = [{"prompt": f"say {i}", "chosen": " yes, gladly", "rejected": " no"} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
]


def sft(tuned: Tuned, folder: Path, **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model=tuned,
        args=SFTConfig(str(folder), **COMMON | {"max_steps": 4, "save_steps": 2} | changes),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=tiny.tokenizer(),
        callbacks=[pegbox.Callback(tuned)],
    )


def dpo(tuned: Tuned, folder: Path, reference: Any, **changes: Any) -> DPOTrainer:
    return DPOTrainer(
        model=tuned,
        ref_model=reference,
        args=DPOConfig(str(folder), **COMMON | {"max_steps": 4, "save_steps": 2, "beta": 0.5} | changes),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny.tokenizer(),
        callbacks=[pegbox.Callback(tuned)],
    )


def grpo(tuned: Tuned, folder: Path, **changes: Any) -> GRPOTrainer:
    def wanted(completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 7 / 7 for text in completions]

    sizes = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6}
    return GRPOTrainer(
        model=tuned,
        reward_funcs=wanted,
        args=GRPOConfig(str(folder), **COMMON | {"max_steps": 3, "save_steps": 3} | sizes | changes),
        train_dataset=Dataset.from_list([{"prompt": f"say {i}"} for i in range(8)]),
        processing_class=tiny.tokenizer(),
        callbacks=[pegbox.Callback(tuned)],
    )


@pytest.mark.parametrize("method", METHODS)
def test_sft(tmp_path: Path, method: str) -> None:
    tuned = tune(method)
    before = snapshot(tuned.trainable().items())
    sft(tuned, tmp_path).train()
    assert_only_the_adapter_changed(tuned, before)
    assert_saved(tuned, tmp_path / "checkpoint-4")
    again = tune(method)
    sft(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in tuned.state().items():
        torch.testing.assert_close(again.state()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("method", KEEP_THE_BASE)
def test_dpo_compares_with_the_disabled_adapter(tmp_path: Path, method: str) -> None:
    """As with a copy of the base for a reference, and without the copy."""
    tuned, other = tune(method), tune(method)
    before = snapshot(tuned.trainable().items())
    trainer = dpo(tuned, tmp_path / "a", tuned.reference())
    trainer.train()
    losses = tiny.losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # an adapter that has learned nothing yet
    assert losses[-1] < losses[0]
    assert_only_the_adapter_changed(tuned, before)
    assert_saved(tuned, tmp_path / "a" / "checkpoint-4")
    copied = dpo(other, tmp_path / "b", base())
    copied.train()
    assert tiny.losses(copied) == pytest.approx(losses, abs=1e-5)
    for key, value in other.state().items():
        torch.testing.assert_close(tuned.state()[key], value, rtol=1e-4, atol=1e-6)


def test_dpo_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    tuned, again = tune("lora"), tune("lora")
    dpo(tuned, tmp_path, tuned.reference()).train()
    dpo(again, tmp_path, again.reference()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in tuned.state().items():
        torch.testing.assert_close(again.state()[key], value, rtol=0, atol=0)


def test_dpo_of_the_base_itself_needs_a_copy(tmp_path: Path) -> None:
    tuned = tune("full")
    with pytest.raises(CannotDisable, match="trains the base's own tensors"):
        tuned.reference()
    before = snapshot(tuned.trainable().items())
    trainer = dpo(tuned, tmp_path, base())
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    moved = [name for name, value in tuned.trainable().items() if not torch.equal(value.detach(), before[name])]
    assert len(moved) == len(before)
    assert_saved(tuned, tmp_path / "checkpoint-4")


@pytest.mark.parametrize("method", METHODS)
def test_grpo(tmp_path: Path, method: str) -> None:
    tuned = tune(method)
    before = snapshot(tuned.trainable().items())
    grpo(tuned, tmp_path).train()
    assert_only_the_adapter_changed(tuned, before)
    assert_saved(tuned, tmp_path / "checkpoint-3")


def test_grpo_held_to_the_disabled_adapter(tmp_path: Path) -> None:
    tuned = tune("lora")
    trainer = grpo(tuned, tmp_path)
    trainer.beta, trainer.ref_model = 0.1, tuned.reference()
    add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature)
    trainer.train()
    distances = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert max(distances) > 0


def test_what_a_trainer_would_leave_out_is_refused(tmp_path: Path) -> None:
    """TRL reads the head's weight itself, so that an adapter on the head would not run."""
    tuned = pegbox.tune(base(), "lora", rank=4, targets="q_proj,lm_head")
    with pytest.raises(MethodError, match=r"lora around the head \(lm_head\) would not run.*exclude='lm_head'"):
        sft(tuned, tmp_path).train()


# -- the reference ---------------------------------------------------------------------------------------------------


def test_a_reference_is_the_base(tmp_path: Path) -> None:
    tuned = tune("lora").train()
    with torch.no_grad():
        for p in tuned.trainable().values():
            p.add_(0.1)
    ids = torch.randint(200, (2, 7))
    reference = tuned.reference()
    expected = copy.deepcopy(base()).eval()(ids).logits
    assert torch.equal(reference(ids).logits, expected)
    assert not torch.equal(tuned(ids).logits, expected)
    assert not reference(ids).logits.requires_grad
    assert tuned.training
    assert not list(reference.parameters())
    assert not list(reference.children())
    assert reference.config is tuned.model.config


def test_a_bare_loop(tmp_path: Path) -> None:
    """DPO with the objective alone: the loss of a batch, and nothing of a trainer."""
    from pegbox import objectives
    from pegbox.data.collate import PairCollator
    from pegbox.data.encoded import Encoded, EncodedPair

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(200, (4, 2, 9), generator=draw).tolist()
    sides = [[Encoded(row, [-100] * 4 + row[4:], "") for row in pair] for pair in ids]
    batch = PairCollator(tiny.PAD)([EncodedPair(a, b, "") for a, b in sides])
    for method in KEEP_THE_BASE:
        tuned = tune(method).train()
        before = snapshot(tuned.trainable().items())
        objective = objectives.get("dpo").given({"beta": 0.5})
        optimizer, losses = torch.optim.AdamW(tuned.groups(lr=1e-2), weight_decay=0.0), []
        for _ in range(3):
            loss = objective(tuned, batch)["dpo"] + tuned.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert_only_the_adapter_changed(tuned, before)
        tuned.save(tmp_path / method)
        assert_saved(tuned, tmp_path / method)
