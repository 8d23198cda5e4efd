"""Widening bfloat16 products: the same numbers, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegbox.core import cpu
from pegbox.core.low_rank import BLOCK_ROWS, low_rank_linear

N, IN, OUT, R = BLOCK_ROWS + 7, 24, 40, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(dtype: torch.dtype) -> list[Tensor]:
    x, w, b = (t.to(dtype) for t in (drawn(N, IN, seed=0), drawn(OUT, IN, seed=1), drawn(OUT, seed=2)))
    x.requires_grad_()
    down, up = drawn(R, IN, seed=3).requires_grad_(), drawn(OUT, R, seed=4).requires_grad_()
    y = low_rank_linear(x, w, b, down, up, 0.5)
    y.backward(drawn(N, OUT, seed=5).to(dtype))
    assert y.dtype == x.grad.dtype == dtype
    return [y.detach().float(), x.grad.float(), down.grad, up.grad]


@pytest.mark.parametrize("multiplies", [True, False])
def test_bfloat16_is_as_exact_widened_or_not(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    want = outcome(torch.float32)
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: multiplies)
    for have, exact in zip(outcome(torch.bfloat16), want, strict=True):
        assert (have - exact).norm() < 1e-2 * exact.norm()


def test_only_large_bfloat16_products_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    many, few = torch.ones(cpu.LEAST_ROWS, 8), torch.ones(1, 8)
    assert cpu.working_dtype(many.bfloat16()) == torch.float32
    assert cpu.working_dtype(few.bfloat16()) == torch.bfloat16
    assert cpu.working_dtype(many.double()) == torch.float64


def test_autocast_does_not_undo_the_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(torch.ones(N, IN), torch.ones(OUT, IN), None, torch.ones(R, IN), torch.ones(OUT, R), 1.0)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.full_like(y, IN + R * IN))
