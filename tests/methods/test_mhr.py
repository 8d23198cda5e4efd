"""Poly, MHR, MHR-z and MHR-mu: an oracle head by head, tasks in one batch, and what each way of training changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.checks.lab import shake
from pegbox.core.errors import AdapterError, MethodError, SettingsError
from pegbox.core.task_mixture import TaskMixtureGraft
from pegbox.core.tuned import Tuned
from pegbox.methods.lora import LoRA
from pegbox.methods.mhr import MHR

from .tiny import family, on_linear

OUT, IN, RANK = 6, 8, 3


def layer(**settings: Any) -> tuple[Tuned, TaskMixtureGraft, Tensor]:
    """One matrix (6, 8) with random values in all that is mixed."""
    tuned, graft, w = on_linear(MHR(targets=".*", rank=RANK, **settings), OUT, IN, seed=None)
    assert isinstance(graft, TaskMixtureGraft)
    shake(tuned, 1, 1.0)
    return tuned, graft, w


def by_hand(graft: TaskMixtureGraft, w: Tensor, x: Tensor, task: int) -> Tensor:
    """A head at a time, a skill at a time: x (t, in) of one task."""
    heads, skills = graft.a.shape[:2]
    z = graft.z[task].view(heads, skills).sigmoid()
    share = z / z.sum(1, keepdim=True)
    down = torch.cat([sum(share[q, k] * graft.a[q, k] for k in range(skills)) for q in range(heads)])  # (in, r)
    up = torch.cat([sum(share[q, k] * graft.b[q, k] for k in range(skills)) for q in range(heads)], 1)  # (r, out)
    return x @ w.T + x @ down @ up / RANK


@pytest.mark.parametrize("heads", [1, 2])
def test_a_batch_of_many_tasks_is_each_row_alone(heads: int) -> None:
    tuned, graft, w = layer(tasks=3, skills=4, heads=heads)
    x = torch.randn(4, 5, IN)
    ids = torch.tensor([2, 0, 2, 1])
    have = tuned(x, task_ids=ids)
    want = torch.stack([by_hand(graft, w, row, int(task)) for row, task in zip(x, ids, strict=True)])
    assert torch.allclose(have, want, rtol=1e-5, atol=1e-5)
    with tuned.given(task_ids=ids):
        assert torch.equal(tuned(x), have)


def test_one_task_is_the_first_of_many() -> None:
    tuned, graft, w = layer(skills=4, heads=2)
    x = torch.randn(5, IN)
    assert torch.allclose(tuned(x), by_hand(graft, w, x, 0), rtol=1e-5, atol=1e-5)
    merged = tuned.merge()
    assert torch.allclose(merged(x), by_hand(graft, w, x, 0), rtol=1e-5, atol=1e-5)


def test_copies_of_rows_have_the_task_of_their_row() -> None:
    tuned, _, _ = layer(tasks=2, heads=1)
    x = torch.randn(2, 5, IN)
    one = tuned(x, task_ids=torch.tensor([1, 0]))
    beams = tuned(x.repeat_interleave(3, 0), task_ids=torch.tensor([1, 0]))
    assert torch.allclose(beams, one.repeat_interleave(3, 0), atol=1e-6)


def test_one_skill_and_one_head_are_lora() -> None:
    tuned, graft, _ = layer(skills=1, heads=1)
    lora, _, _ = on_linear(LoRA(targets=".*", rank=RANK, alpha=1.0), OUT, IN)
    lora.load_state({"graft.0.a": graft.a[0, 0].T.contiguous(), "graft.0.b": graft.b[0, 0].T.contiguous()})
    x = torch.randn(5, IN)
    assert torch.allclose(tuned(x), lora(x), atol=1e-5)


def test_skills_start_almost_alike() -> None:
    _, graft, _ = on_linear(MHR(targets=".*", tasks=3, skills=5, heads=2, rank=RANK), OUT, IN, seed=None)
    assert isinstance(graft, TaskMixtureGraft)
    shares = graft.shares()
    assert torch.allclose(shares.sum(-1), torch.ones(3, 2))
    assert torch.allclose(shares, torch.full((3, 2, 5), 0.2), atol=1e-3)


@pytest.mark.parametrize(
    ("ids", "words"),
    [([0, 3], "0..2, as mhr.tasks is 3, got 3"), ([0.5, 1], "got 0.5"), ([0, 1, 2], "3 task_ids were given for")],
)
def test_a_wrong_task_is_refused(ids: list[float], words: str) -> None:
    tuned, _, _ = layer(tasks=3, heads=1)
    with pytest.raises(MethodError, match=words):
        tuned(torch.randn(2, 5, IN), task_ids=torch.tensor(ids))
    with pytest.raises(MethodError, match="rows must say theirs"):
        tuned(torch.randn(2, 5, IN))


def test_heads_must_divide() -> None:
    with pytest.raises(SettingsError, match="heads must divide both sides of 0 "):
        layer(heads=4)


def test_routing_alone_learns_a_few_numbers() -> None:
    tuned = pegbox.tune(family("llama"), "mhr", train="routing", skills=3, heads=2, rank=2)
    assert {key.rpartition(".")[2] for key in tuned.trainable()} == {"z"}
    assert tuned.count()[0] == 3 * 2 * len(tuned.sites)


def test_z_has_a_rate_of_its_own() -> None:
    tuned, graft, _ = layer(heads=1)
    rates = {id(p): group["lr"] for group in tuned.groups(1e-3) for p in group["params"]}
    assert rates[id(graft.z)] == pytest.approx(0.1)
    assert rates[id(graft.a)] == pytest.approx(1e-3)


def test_drawn_weights_differ_while_training_alone() -> None:
    tuned, _, _ = layer(heads=1, sample=True)
    x = torch.randn(2, IN)
    tuned.train()
    assert not torch.equal(tuned(x), tuned(x))
    tuned.eval()
    assert torch.equal(tuned(x), tuned(x))


@pytest.mark.parametrize("train", ["all", "routing", "average"])
def test_a_new_task_starts_from_the_skills_of_others(tmp_path: Path, train: str) -> None:
    many = pegbox.tune(family("llama"), "mhr", tasks=3, skills=4, heads=2, rank=2)
    shake(many, 1, 0.3)
    many.save(tmp_path)
    before = {key: value.clone() for key, value in many.state().items()}

    few = pegbox.tune(family("llama"), "mhr", train=train, skills=4, heads=2, rank=2)
    pegbox.load(few, tmp_path, name="before")
    few.inherit("default", "before").remove("before", then="default")
    for key, value in few.state().items():
        name = key.rpartition(".")[2]
        if name == "z":
            assert value.shape == (1, 8)
            assert value.abs().max() <= 1e-3
        else:
            want = before[key].mean(1, keepdim=True) if train == "average" else before[key]
            assert torch.equal(value, want)


def test_the_average_is_constant_routing() -> None:
    tuned, graft, _ = layer(skills=4, heads=2)
    with torch.no_grad():
        graft.z.zero_()
    mean, own, _ = layer(train="average", heads=2)
    with torch.no_grad():
        own.a.copy_(graft.a.mean(1, keepdim=True))
        own.b.copy_(graft.b.mean(1, keepdim=True))
    x = torch.randn(5, IN)
    assert torch.allclose(mean(x), tuned(x), atol=1e-5)


def test_a_method_goes_on_from_its_own_alone(tmp_path: Path) -> None:
    pegbox.tune(family("llama"), "lora", rank=2).save(tmp_path)
    few = pegbox.tune(family("llama"), "mhr", rank=2, heads=2)
    pegbox.load(few, tmp_path, name="before")
    with pytest.raises(AdapterError, match="'before' is of lora, and mhr cannot go on from it"):
        few.inherit("default", "before")
