"""BAT: the block formula against loops, grouped-query shapes, clean failures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.core.errors import SettingsError
from pegbox.methods.bat import BAT, BATGraft

from .tiny import family, on_linear


def by_loops(w: Tensor, b: Tensor, r: int) -> Tensor:
    """W_ab' = W_ab (I + B_a) + B_a."""
    new = w.clone()
    for a in range(w.shape[0] // r):
        for c in range(w.shape[1] // r):
            block = w[a * r : (a + 1) * r, c * r : (c + 1) * r]
            new[a * r : (a + 1) * r, c * r : (c + 1) * r] = block @ (torch.eye(r) + b[a]) + b[a]
    return new


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_block_formula(rank: int) -> None:
    tuned, graft, w = on_linear(BAT(rank=rank, targets=".*"), 16, 12)
    assert isinstance(graft, BATGraft)
    want = by_loops(w, graft.b.detach(), rank)
    assert torch.allclose(graft.weight(w), want, atol=1e-6)
    x = torch.randn(3, 12)
    assert torch.allclose(tuned(x), x @ want.T, atol=1e-5)


def test_the_change_is_of_full_rank() -> None:
    _, graft, w = on_linear(BAT(rank=2, targets=".*"), 12, 12)
    assert torch.linalg.matrix_rank((graft.weight(w) - w).detach()) == 12


def test_merge_then_unmerge_recovers_w() -> None:
    tuned, _, w = on_linear(BAT(rank=4, targets=".*"), 16, 12)
    tuned.merge()
    assert not torch.equal(tuned.model[0].weight, w)  # type: ignore[index, arg-type]
    tuned.unmerge()
    assert torch.equal(tuned.model[0].weight, w)  # type: ignore[index, arg-type]


def test_parameters() -> None:
    tuned, *_ = on_linear(BAT(rank=4, targets=".*"), 16, 12)
    assert tuned.count()[0] == 4 * 16


def test_grouped_query_attention() -> None:
    """Keys and values have half the outputs of queries: 16 divides all sides, 12 does not."""
    assert pegbox.tune(family("llama"), "bat", rank=16).count()[0] == 2 * 16 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    model = family("llama")
    with pytest.raises(SettingsError, match=r"rank must divide both sides of the 32 x 32 weight at .*q_proj, got 12"):
        pegbox.tune(model, "bat", rank=12)
    assert not [m for m in model.modules() if "forward" in m.__dict__]
