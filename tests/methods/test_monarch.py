"""Monarch in a matrix's place: the nearest one, its parameters, and from sparse to dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pegbox
from pegbox.core.monarch import dense, project
from pegbox.methods.monarch import Monarch, MonarchGraft

from .tiny import on_linear


def put(out: int, in_: int, **settings: Any) -> tuple[Any, MonarchGraft, torch.Tensor]:
    tuned, graft, w = on_linear(Monarch(targets=".*", **settings), out, in_, bias=True, seed=None)
    assert isinstance(graft, MonarchGraft)
    return tuned, graft, w


@pytest.mark.parametrize(("out", "in_"), [(16, 16), (12, 20), (13, 9)])
@pytest.mark.parametrize("rank", [1, 2])
def test_it_starts_as_the_nearest_and_runs_as_its_dense_form(out: int, in_: int, rank: int) -> None:
    tuned, graft, w = put(out, in_, rank=rank)
    right, left = project(w, 4, 4, rank)
    assert torch.equal(graft.right, right)
    x = torch.randn(3, 5, in_)
    want = x @ dense(right, left, out, in_).T + tuned.model[0].bias
    assert torch.allclose(tuned(x), want, atol=1e-5)
    assert torch.allclose(tuned.merge()(x), want, atol=1e-5)


def test_a_monarch_matrix_comes_back_exactly() -> None:
    tuned, _, _ = put(16, 16)
    x = torch.randn(3, 16)
    before = tuned(x)
    merged = tuned.merge()
    again = pegbox.tune(merged, Monarch(targets=".*"))
    assert torch.allclose(again(x), before, atol=1e-5)


def test_numbers() -> None:
    tuned, graft, _ = put(16, 16)
    assert sum(p.numel() for p in graft.parameters()) == 2 * 16**1.5
    drawn, _, _ = put(16, 16, start="random")
    assert not torch.allclose(drawn(torch.ones(1, 16)), tuned(torch.ones(1, 16)))
