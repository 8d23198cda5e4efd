"""What trains now, of what an adapter trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pegbox
from pegbox.checks import models
from pegbox.core import Stack, Tuned
from pegbox.core.errors import MethodError

BATCH = models.text(0)


def tuned(method: str = "lora", **settings: Any) -> Tuned:
    torch.manual_seed(0)
    return pegbox.tune(models.llama(), method, **settings)


def test_what_rests_has_no_gradient_and_keeps_none() -> None:
    t = tuned("full")
    t(**BATCH).loss.backward()
    kept = [key for key in t.trainable() if ".mlp." in key]
    t.select(kept)
    assert list(t.trainable()) == kept
    assert all((p.grad is None) != (f"base.{n}" in kept) for n, p in t.model.named_parameters())
    t.zero_grad()
    t(**BATCH).loss.backward()
    assert all((p.grad is None) != (f"base.{n}" in kept) for n, p in t.model.named_parameters())


def test_groups_hold_what_rests_too() -> None:
    t = tuned("full")
    before = [group["names"] for group in t.groups(1e-3, 0.1)]
    t.select(key for key in t.trainable() if ".mlp." in key)
    assert [group["names"] for group in t.groups(1e-3, 0.1)] == before
    t.select(None)
    assert len(t.trainable()) == sum(map(len, before))


def test_grafts_rest_as_well_and_stay_so_when_used_again() -> None:
    t = tuned("lora", rank=2, name="a")
    t.add("b", pegbox.method("lora", rank=2))
    t.use(Stack("a", "b"))
    some = [key for key in t.state("a") if ".layers.0." in key]
    t.select(some, "a")
    assert {k for k in t.trainable() if k.startswith("a:")} == {f"a:{key}" for key in some}
    assert sum(k.startswith("b:") for k in t.trainable()) == len(t.state("b"))
    assert len([name for group in t.groups(1e-3) for name in group["names"]]) == len(t.state("a")) + len(t.state("b"))
    t.use("a")
    assert list(t.trainable()) == some
    assert t.state("a").keys() > set(some)  # resting is not leaving


def test_a_key_of_nothing_is_refused() -> None:
    t = tuned("full")
    with pytest.raises(MethodError, match=r"'base.model.norm.wait' is nothing that Full trains; .*model.norm.weight"):
        t.select(["base.model.norm.wait"])
    assert all(p.requires_grad for p in t.model.parameters())
