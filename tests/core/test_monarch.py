"""Monarch matrices: the element formula, the projection against brute force, what they hold exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegbox.core.monarch import dense, multiply, project

SIZES = [(16, 16, 4, 4), (12, 20, 4, 5), (10, 7, 3, 2), (9, 16, 3, 4)]  # out, in, input blocks, output blocks


def factors(out: int, in_: int, k: int, l_: int, rank: int = 1) -> tuple[Tensor, Tensor]:
    p, s = -(-in_ // k), -(-out // l_)
    return torch.randn(k, rank * l_, p), torch.randn(l_, s, rank * k)


@pytest.mark.parametrize(("out", "in_", "k", "l_"), SIZES)
def test_entries_are_those_of_the_paper(out: int, in_: int, k: int, l_: int) -> None:
    """M[(a, b), (c, e)] = L[b, a, c] R[c, b, e], row a l + b, column c p + e."""
    right, left = factors(out, in_, k, l_)
    p = right.shape[2]
    want = torch.tensor(
        [[left[i % l_, i // l_, j // p] * right[j // p, i % l_, j % p] for j in range(in_)] for i in range(out)]
    )
    torch.testing.assert_close(dense(right, left, out, in_), want)
    x = torch.randn(2, 3, in_)
    torch.testing.assert_close(multiply(x, right, left, out), x @ want.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("out", "in_", "k", "l_"), SIZES)
def test_projection_is_the_best(out: int, in_: int, k: int, l_: int, rank: int) -> None:
    """Its error is what the singular values left out of each slice make; no other factors come nearer."""
    w = torch.randn(out, in_)
    right, left = project(w, k, l_, rank)
    made = dense(right, left, out, in_)
    p = right.shape[2]
    lost = 0.0
    for b in range(l_):
        for c in range(k):
            slice_ = w[b::l_, c * p : (c + 1) * p]
            lost += torch.linalg.svdvals(slice_)[rank:].square().sum().item()
    assert (w - made).square().sum().item() == pytest.approx(lost, rel=1e-4, abs=1e-8)
    near = [factor + 1e-2 * torch.randn_like(factor) for factor in (right, left)]
    assert (w - dense(near[0], near[1], out, in_)).square().sum() >= lost - 1e-5
    torch.testing.assert_close(dense(*project(made, k, l_, rank), out, in_), made, rtol=1e-4, atol=1e-5)


def test_it_holds_kronecker_products_and_the_fourier_transform() -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 2)
    product = torch.kron(a, b)  # rows (a, b), columns (c, e)
    right, left = project(product, 4, 5)
    torch.testing.assert_close(dense(right, left, 15, 8), product, rtol=1e-4, atol=1e-5)
    m = 4
    j = torch.arange(m * m)
    swapped = j.view(m, m).T.flatten()
    cosines = torch.cos(2 * torch.pi * torch.outer(j, j) / m**2)[:, swapped]
    sines = torch.sin(2 * torch.pi * torch.outer(j, j) / m**2)[:, swapped]
    for part in (cosines, sines):  # the real and the imaginary part of rank one are of rank two each
        torch.testing.assert_close(dense(*project(part, m, m, 2), m * m, m * m), part, rtol=1e-4, atol=1e-5)


def test_a_square_one_has_two_n_to_the_three_halves_numbers() -> None:
    right, left = project(torch.randn(16, 16), 4, 4)
    assert right.numel() + left.numel() == 2 * 16**1.5
