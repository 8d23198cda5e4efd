"""Attention in blocks is attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pegbox.core.causal_attention import causal_attention


def inputs(length: int, dtype: torch.dtype, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, n, length, 16, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_and_its_gradients_are_those_of_the_plain_equation(length: int, groups: int) -> None:
    given = inputs(length, torch.float64, groups=groups)
    theirs = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)
    ours = causal_attention(*given)
    error = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, atol=1e-12)
    expected = torch.autograd.grad(theirs, given, error)
    for mine, other in zip(torch.autograd.grad(ours, given, error), expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_in_bfloat16_it_is_as_exact_as_bfloat16_and_autocast_brings_it_there() -> None:
    single = inputs(150, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = causal_attention(*single)
    theirs = F.scaled_dot_product_attention(*single, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).abs().max() < 2e-2
    for mine, other in zip(
        torch.autograd.grad(ours.float().square().sum(), single),
        torch.autograd.grad(theirs.square().sum(), single),
        strict=True,
    ):
        assert (mine - other).norm() < 2e-2 * other.norm()


def test_views_of_a_projection_are_read_as_they_lie() -> None:
    given = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(70, torch.float64)
    ]
    theirs = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)
    ours = causal_attention(*given)
    assert torch.allclose(ours, theirs)
    mine = torch.autograd.grad(ours.square().sum(), given)
    assert all(
        torch.allclose(a, b) for a, b in zip(mine, torch.autograd.grad(theirs.square().sum(), given), strict=True)
    )
