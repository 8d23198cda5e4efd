"""LISA in TRL's trainers: the blocks in turn train, the embeddings and the head always do, nothing else is held."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import pegbox
from pegbox.core import Tuned
from train import tiny

from .test_trl_trainers import dpo, grpo, sft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

BLOCKS, STEPS = 3, 4
PLAIN: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS, "max_grad_norm": 0.0}
ALWAYS = {"base.model.embed_tokens.weight", "base.model.norm.weight", "base.lm_head.weight"}


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SIZES", tiny.SIZES | {"num_hidden_layers": BLOCKS})


def lisa() -> Tuned:
    return pegbox.tune(tiny.llama(), "lisa", active=1, period=2)


def preferences(tuned: Tuned, folder: Path, **changes: Any) -> Any:
    return dpo(tuned, folder, tiny.llama(), **changes)


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": preferences, "grpo": grpo}


def expected(tuned: Tuned, step: int) -> set[str]:
    """Keys of what trains at a step."""
    method: Any = tuned.method
    drawn = tuple(f"base.{path}." for path in method.drawn(tuned.anatomy.blocks, step))
    return {key for key in tuned.state() if key.startswith(drawn)} | ALWAYS


class Watch(TrainerCallback):
    """What has a gradient when the optimizer steps, what it holds and what has moved afterwards, step by step."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.gradients: list[set[str]] = []
        self.held: list[set[str]] = []
        self.moved: list[set[str]] = []
        self.batches: list[dict[str, torch.Tensor]] = []
        self.before = self.values()

    def values(self) -> dict[str, torch.Tensor]:
        return {f"base.{name}": p.detach().clone() for name, p in self.tuned.model.named_parameters()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = self.tuned.model.named_parameters()
        self.gradients.append({f"base.{name}" for name, p in named if p.grad is not None and bool(p.grad.any())})
        assert all(bool(p.grad.isfinite().all()) for p in self.tuned.model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        holds = {id(p) for p in kwargs["optimizer"].state}
        self.held.append({f"base.{name}" for name, p in self.tuned.model.named_parameters() if id(p) in holds})
        now = self.values()
        self.moved.append({key for key, value in now.items() if not torch.equal(value, self.before[key])})
        self.before = now


def trained(kind: str, folder: Path, **changes: Any) -> tuple[Tuned, Any, Watch]:
    tuned = lisa()
    watch = Watch(tuned)
    trainer = TRAINERS[kind](tuned, folder, **PLAIN | changes)
    trainer.add_callback(watch)
    trainer.train()
    return tuned, trainer, watch


@pytest.mark.parametrize("kind", TRAINERS)
def test_blocks_in_turn_train_and_nothing_else(kind: str, tmp_path: Path) -> None:
    tuned, trainer, watch = trained(kind, tmp_path)
    wanted = [expected(tuned, step) for step in range(STEPS)]
    assert len({frozenset(keys) for keys in wanted}) > 1  # the turn has passed on
    assert watch.gradients == wanted
    assert watch.held == wanted
    assert watch.moved == wanted
    assert all(math.isfinite(loss) for loss in tiny.losses(trainer))
    assert all(bool(value.isfinite().all()) for value in tuned.state().values())
    saved = pegbox.load(tiny.llama(), tmp_path / f"checkpoint-{STEPS}")
    assert all(torch.equal(value, tuned.state()[key]) for key, value in saved.state().items())


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_same_as_a_bare_loop(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own batches and losses, and LISA written out by hand: AdamW made anew for whoever comes in."""
    batches: list[Any] = []
    kept = Trainer.training_step

    def noting(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        prepared = self._prepare_inputs(inputs)
        batches.append(prepared)
        self._prepare_inputs = lambda given: given
        try:
            return kept(self, model, prepared, *more)
        finally:
            del self._prepare_inputs

    monkeypatch.setattr(Trainer, "training_step", noting)
    tuned, *_ = trained(kind, tmp_path / "a")
    monkeypatch.undo()
    assert len(batches) == STEPS

    monkeypatch.setattr(tiny, "SIZES", tiny.SIZES | {"num_hidden_layers": BLOCKS})
    other = lisa()
    bare: Any = TRAINERS[kind](other, tmp_path / "b", **PLAIN)
    _by_hand(other, bare, batches)
    for key, value in tuned.state().items():
        torch.testing.assert_close(other.state()[key], value, rtol=0, atol=0)


def _by_hand(tuned: Tuned, trainer: Any, batches: list[Any]) -> None:
    parameters = {f"base.{name}": p for name, p in tuned.model.named_parameters()}
    optimizers: dict[str, torch.optim.AdamW] = {}
    tuned.train()
    trainer.current_gradient_accumulation_steps = 1  # which the trainer's loop would set
    for step, batch in enumerate(batches):
        now = expected(tuned, step)
        optimizers = {key: optimizers.get(key) or _adamw(parameters[key]) for key in now}
        for key, parameter in parameters.items():
            parameter.requires_grad_(key in now)
        loss = trainer.compute_loss(tuned, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], "cpu"))
        loss.backward()
        for key in now:
            optimizers[key].step()
            parameters[key].grad = None


def _adamw(parameter: torch.nn.Parameter) -> torch.optim.AdamW:
    """As transformers makes it by default."""
    return torch.optim.AdamW([parameter], 1e-2, weight_decay=0.0, fused=True)


def test_a_resumed_run_takes_the_same_turns(tmp_path: Path) -> None:
    whole, _, watch = trained("sft", tmp_path, save_steps=3)
    tuned = lisa()
    trainer = sft(tuned, tmp_path, **PLAIN | {"save_steps": 3})
    trainer.add_callback(later := Watch(tuned))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert later.held == watch.held[3:]
    assert all(torch.equal(value, whole.state()[key]) for key, value in tuned.state().items())
    assert isinstance(tuned.model, LlamaForCausalLM)
