"""The low-rank kernel against the plain expression: values, every gradient, what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pegbox.core.low_rank import as_matrix, fold, low_rank_linear, low_rank_product


def plain(x: Tensor, w: Tensor, b: Tensor | None, down: Tensor | int, up: Tensor, scale: float) -> Tensor:
    return F.linear(x, w, b) + scale * F.linear(F.linear(x, as_matrix(down, x.shape[-1], up)), up)


def tensors(*, shape: tuple[int, ...], out: int, rank: int, bias: bool, seed: int = 0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    sizes = (shape, (out, shape[-1]), (out,) if bias else None, (rank, shape[-1]), (out, rank))
    made = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() if s else None for s in sizes]
    return list(made)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 3, 13)])
@pytest.mark.parametrize("shards", [False, True])
def test_value_and_gradients(shape: tuple[int, ...], bias: bool, shards: bool) -> None:
    x, w, b, a, up = tensors(shape=shape, out=7, rank=4, bias=bias)
    assert a is not None
    down = 4 if shards else a
    wanted = [t for t in (x, w, b, None if shards else a, up) if t is not None]
    got, want = (f(x, w, b, down, up, 0.5) for f in (low_rank_linear, plain))
    assert torch.allclose(got, want)
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    for g, h in zip(
        torch.autograd.grad((got * weights).sum(), wanted),
        torch.autograd.grad((want * weights).sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(g, h)


def test_a_frozen_matrix_gets_no_gradient() -> None:
    x, w, _, a, up = tensors(shape=(5, 12), out=7, rank=4, bias=False)
    assert w is not None
    y = low_rank_linear(x, w.detach(), None, a, up, 1.0)
    y.sum().backward()
    assert w.grad is None
    assert all(t is not None and t.grad is not None for t in (x, a, up))


def test_masters_stay_float32_beside_a_bfloat16_matrix() -> None:
    x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(7, 12, dtype=torch.bfloat16)
    a, up = torch.randn(4, 12, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    y = low_rank_linear(x, w, None, a, up, 2.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad is not None
    assert up.grad is not None
    assert x.grad is not None
    assert (a.grad.dtype, up.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)


def test_several_sites_keep_their_input_once() -> None:
    """q, k and v read one tensor; what they save for backward is that tensor, not copies of it."""
    x = torch.randn(8, 12, requires_grad=True) * 1.0
    saved: set[int] = set()

    def keep(t: Tensor) -> Tensor:
        if t.shape == x.shape:
            saved.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for _ in range(3):
            low_rank_linear(x, torch.randn(7, 12), None, torch.randn(4, 12, requires_grad=True), torch.randn(7, 4), 1.0)
    assert saved == {x.data_ptr()}


def test_autocast() -> None:
    x, w = torch.randn(5, 12), torch.randn(7, 12)
    a, up = torch.randn(4, 12, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(x, w, None, a, up, 1.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


def test_fold_sums_shards() -> None:
    x = torch.arange(7.0)
    assert fold(x, 3).tolist() == [0 + 3 + 6, 1 + 4, 2 + 5]
    assert torch.equal(fold(x, 3), F.linear(x, as_matrix(3, 7, x)))


def test_product_alone() -> None:
    x, _, _, a, up = tensors(shape=(5, 12), out=7, rank=4, bias=False)
    assert isinstance(a, Tensor)
    assert isinstance(up, Tensor)
    assert isinstance(x, Tensor)
    assert torch.allclose(low_rank_product(x, a, up, 0.5), 0.5 * x @ a.T @ up.T)
