"""Partial back-propagation against autograd: the same numbers, and no more kept than they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pegbox
from pegbox.core import Stack
from pegbox.core.channels import frozen_linear, input_channels, output_channels
from pegbox.core.context import Context
from pegbox.core.site import Base, ModuleSite

OUT, IN, CHOSEN = 6, 40, 4
INDEX = torch.tensor([3, 0, 17, 38])
ROWS = torch.tensor([5, 1, 0, 2])

CASES = {
    "inputs": (input_channels, INDEX, (OUT, CHOSEN), 1),
    "outputs": (output_channels, ROWS, (CHOSEN, IN), 0),
}


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)


def parameters(module: nn.Linear, **values: Tensor) -> tuple[Tensor, Tensor | None] | None:
    site = ModuleSite("lin", module, Context(None))  # type: ignore[arg-type]  # no anatomy is asked for
    return frozen_linear(Base(site, (), values))


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return value.to(dtype).requires_grad_()


def _of(module: nn.Linear) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def plain(module: nn.Linear, x: Tensor, index: Tensor, delta: Tensor, side: int) -> Tensor:
    """The equation, for autograd."""
    return F.linear(x, module.weight.to(delta).index_add(side, index, delta).to(x.dtype), module.bias)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_autograd_s(kind: str, bias: bool) -> None:
    function, index, shape, side = CASES[kind]
    module = linear(bias=bias)
    for lead in ((5,), (2, 3), ()):
        x, delta = drawn(*lead, IN, seed=1), drawn(*shape, seed=2)
        want = plain(module, x, index, delta, side)
        g = drawn(*want.shape, seed=3).detach()
        wanted = torch.autograd.grad(want, (x, delta), g)
        have = function(x, *_of(linear(bias=bias)), index, delta)
        assert torch.allclose(have, want, atol=1e-5)
        for got, should in zip(torch.autograd.grad(have, (x, delta), g), wanted, strict=True):
            assert got.shape == should.shape
            assert torch.allclose(got, should, atol=1e-5)


def test_only_a_frozen_weight_will_do() -> None:
    module = linear()
    found = parameters(module)
    assert found is not None
    assert found[0].equal(module.weight)
    assert parameters(module, weight=drawn(OUT, IN, seed=4)) is None  # as another graft sets it
    assert parameters(module.requires_grad_()) is None


@pytest.mark.parametrize("order", [("lora", "s2ft"), ("s2ft", "lora")])
def test_in_a_stack_both_train(order: tuple[str, str]) -> None:
    model = nn.Sequential(linear().requires_grad_(True))
    targets = {"lora": {"rank": 2, "targets": "0"}, "s2ft": {"targets": "0", "down": 0.2}}
    tuned = pegbox.tune(model, order[0], name=order[0], **targets[order[0]])
    tuned.add(order[1], pegbox.method(order[1], **targets[order[1]])).use(Stack(*order))
    x = drawn(5, IN, seed=1)
    with torch.no_grad():
        for i, p in enumerate(tuned.trainable().values()):
            p.copy_(drawn(*p.shape, seed=i))
    gradients = []
    for call in (tuned, tuned.merge):
        y = call(x) if call is tuned else call()(x)
        gradients.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    for have, want in zip(*gradients, strict=True):
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_half_precision_keeps_float32_masters(kind: str) -> None:
    function, index, shape, side = CASES[kind]
    module = linear(torch.bfloat16)
    x, delta = drawn(70, IN, seed=1, dtype=torch.bfloat16), drawn(*shape, seed=2)
    have = function(x, module.weight, module.bias, index, delta)
    assert have.dtype == torch.bfloat16
    gx, g_delta = torch.autograd.grad(have, (x, delta), torch.ones_like(have))
    assert (gx.dtype, g_delta.dtype) == (torch.bfloat16, torch.float32)
    wide = linear(torch.bfloat16).float()
    want = plain(wide, x.detach().float(), index, delta, side)
    assert (have - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("kind", CASES)
def test_under_autocast(kind: str) -> None:
    function, index, shape, _ = CASES[kind]
    x, delta = drawn(5, IN, seed=1), drawn(*shape, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, *_of(linear()), index, delta)
    assert y.dtype == torch.bfloat16
    gx, g_delta = torch.autograd.grad(y.float().sum(), (x, delta))
    assert gx.dtype == g_delta.dtype == torch.float32


def kept(call: Callable[[], Tensor], *, without: tuple[Tensor, ...]) -> int:
    """Numbers that autograd keeps for the backward pass, parameters aside."""
    known = {t.untyped_storage().data_ptr() for t in without}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        at = t.untyped_storage().data_ptr()
        if at not in known:
            sizes[at] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(sizes.values())


def test_of_x_only_the_chosen_channels_are_kept() -> None:
    """A share of s / in of it."""
    module, n = linear(), 50
    x, delta = drawn(n, IN, seed=1), drawn(OUT, CHOSEN, seed=2)
    found = kept(
        lambda: input_channels(x, module.weight, module.bias, INDEX, delta),
        without=(module.weight, module.bias, delta, INDEX),
    )
    assert found == n * CHOSEN == x.numel() * CHOSEN // IN


def test_for_the_rows_x_is_kept_once_and_not_copied() -> None:
    module = linear()
    x, delta = drawn(50, IN, seed=1), drawn(CHOSEN, IN, seed=2)
    known = (module.weight, module.bias, delta, ROWS, x)
    assert kept(lambda: output_channels(x, module.weight, module.bias, ROWS, delta), without=known) == 0
