"""MoRe: the invariants of Monarch's card for it."""

from __future__ import annotations

import pytest
import torch

import pegbox
from pegbox.core.errors import SettingsError
from pegbox.methods.more import MoRe, MoReGraft

from .tiny import family, on_linear


@pytest.mark.parametrize(("out", "in_"), [(16, 24), (10, 7), (5, 21)])
def test_the_change_has_a_higher_rank_than_loras_of_as_many_numbers(out: int, in_: int) -> None:
    tuned, graft, w = on_linear(MoRe(blocks=4, rank=1, targets=".*"), out, in_)
    assert isinstance(graft, MoReGraft)
    torch.nn.init.normal_(graft.left)
    change = (graft.weight(w) - w).detach()
    assert 1 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 4
    x = torch.randn(2, 3, in_)
    torch.testing.assert_close(tuned(x), x @ (w + change).T, rtol=1e-4, atol=1e-5)


def test_it_has_loras_numbers() -> None:
    more, lora = (pegbox.tune(family("llama"), name, rank=4).count()[0] for name in ("more", "lora"))
    assert more == lora


def test_dropout_is_of_the_update_alone() -> None:
    tuned, graft, w = on_linear(MoRe(blocks=2, rank=2, dropout=0.5, targets=".*"), 8, 8)
    assert isinstance(graft, MoReGraft)
    torch.nn.init.normal_(graft.left)
    x = torch.randn(400, 8)
    change = tuned.train()(x) - x @ w.T
    whole = tuned.eval()(x) - x @ w.T
    kept = change.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(change[kept], 2 * whole[kept], rtol=1e-3, atol=1e-4)


def test_more_blocks_than_channels_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"blocks must be 1\.\.16 at .*k_proj"):
        pegbox.tune(family("llama"), "more", blocks=17)
