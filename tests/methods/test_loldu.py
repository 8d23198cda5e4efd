"""LoLDU: the invariants of its card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pegbox
from pegbox.methods.loldu import LoLDU, LoLDUGraft, factorised

from .tiny import family, on_linear

SHAPES = [(8, 12), (12, 8), (9, 9)]


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_factors_are_the_matrix(out: int, in_: int) -> None:
    w = torch.randn(out, in_).bfloat16().float()
    lower, d, upper = factorised(w, min(out, in_))
    torch.testing.assert_close(lower * d @ upper, w, rtol=1e-4, atol=1e-5)
    assert (lower.abs() <= 1 + 1e-6).all(), "partial pivoting"
    torch.testing.assert_close(upper.diagonal(), torch.ones(min(out, in_)))


def test_one_checkpoint_in_two_dtypes_has_one_factorisation() -> None:
    w = torch.randn(8, 12)
    for ours, theirs in zip(factorised(w, 4), factorised(w.bfloat16(), 4), strict=True):
        assert ours.equal(theirs)


def test_a_pivot_of_zero_changes_nothing() -> None:
    w = torch.ones(4, 4)
    lower, d, upper = factorised(w, 4)
    assert all(torch.isfinite(part).all() for part in (lower, d, upper))
    torch.testing.assert_close(lower * d @ upper, w)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_r_numbers_change_the_weight_by_rank_r_and_linearly(out: int, in_: int) -> None:
    tuned, graft, w = on_linear(LoLDU(rank=3, alpha=6.0, targets=".*"), out, in_, seed=None)
    assert isinstance(graft, LoLDUGraft)
    x = torch.randn(2, in_)
    assert tuned(x).equal(torch.nn.functional.linear(x, w))
    assert [p.numel() for p in graft.parameters()] == [3]
    step = torch.randn(3)
    changes = []
    for times in (1, 2):
        with torch.no_grad():
            graft.z.copy_(graft.d + times * step)
        changes.append((graft.weight(w) - w).detach())
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(changes[0], rtol=1e-4) <= 3
    torch.testing.assert_close(changes[0], 2.0 * (graft.lower * step) @ graft.upper, rtol=1e-4, atol=1e-5)


def test_the_file_holds_r_numbers_a_layer(tmp_path: Path) -> None:
    tuned = pegbox.tune(family("llama"), "loldu", rank=4)
    with torch.no_grad():
        for p in tuned.trainable().values():
            p.add_(torch.randn_like(p))
    tuned.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in saved.values()} == {(4,)}
    ids = torch.arange(6)[None]
    want = tuned.eval()(ids).logits
    torch.testing.assert_close(pegbox.load(family("llama"), tmp_path)(ids).logits, want)


@pytest.mark.parametrize("start", ["mean", "normal", "uniform", "ones", "zeros"])
def test_other_starts_are_not_the_base(start: str) -> None:
    method = LoLDU(rank=3, start=start, targets=".*")  # type: ignore[arg-type]
    tuned, graft, w = on_linear(method, 8, 12, seed=None)
    assert not method.traits.identity
    assert isinstance(graft, LoLDUGraft)
    if start in ("ones", "zeros"):
        assert graft.z.eq({"ones": 1.0, "zeros": 0.0}[start]).all()
    x = torch.randn(2, 12)
    assert not torch.allclose(tuned(x), x @ w.T)
