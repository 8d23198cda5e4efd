"""Trained whole channels of a matrix, with partial back-propagation: of x no more is kept than their gradient needs.

    input channels     y = W x + b + D x[i]          W: (out, in)   i: (s,)   D: (out, s)
    output channels    y = W x + b;  y[i] += D x                              D: (s, in)

The gradient of D for input channels is g^T x[i]: only x[..., i], (..., s), is kept; x itself, (..., in), is free as
soon as nothing else needs it.  The gradient of x is that of W x for all channels, and D's for those of i.  D is a
float32 master, and never rounded into W; products run in the dtype of x (see low_rank.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegbox.core.low_rank import sum_of_products
from pegbox.core.site import Base


def frozen_linear(base: Base) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias (out,) of a bare linear layer that keeps plain numbers and does not train them.

    None where it is another: the gradient of a weight needs all of x.
    """
    if not base.site.is_linear or base.grafts:
        return None
    weight, bias = base.site.linear_parameters(base.values)
    return (weight, bias) if isinstance(weight, Tensor) and not weight.requires_grad else None


def input_channels(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
    """`F.linear(x, weight, bias)` with delta (out, s) added to the columns `index` (s,) of a frozen weight.

    Args:
        x: (..., in)
        weight: (out, in)
        bias: (out,) or None

    Returns:
        (..., out), in the dtype of x (under autocast, in autocast's).
    """
    return _run(_InputChannels, x, weight, bias, index, delta)


def output_channels(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
    """The same with delta (s, in) added to the rows `index` (s,)."""
    return _run(_OutputChannels, x, weight, bias, index, delta)


def _run(function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):  # it would undo the widening
        y: Tensor = function.apply(x, weight, bias, index, delta)  # (n, out)
    return y.view(*x.shape[:-1], y.shape[-1])  # out here, or what changes its views in place is forbidden to


def _add_at(y: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """y[:, index] += part, in place: (n, m), (s,), (n, s).  In bfloat16 a quarter of `index_add_`'s time."""
    return y.index_copy_(1, index, y.index_select(1, index).add_(part))


class _InputChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        part = rows.index_select(1, index)  # (n, s)
        ctx.save_for_backward(part, weight, index, delta)
        ctx.shape = x.shape
        return sum_of_products(rows, weight.T, part, delta.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        part, weight, index, delta = ctx.saved_tensors
        wants_x, _, wants_bias, _, wants_delta = ctx.needs_input_grad
        gx = None
        if wants_x:
            gx = _add_at(sum_of_products(g, weight), index, g @ delta.to(g.dtype)).view(ctx.shape)
        g_delta = (g.T @ part).to(delta.dtype) if wants_delta else None
        return gx, None, g.sum(0) if wants_bias else None, None, g_delta


class _OutputChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        ctx.save_for_backward(x, weight, index, delta)
        y = sum_of_products(rows, weight.T, bias=bias)  # (n, out)
        return _add_at(y, index, rows @ delta.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, delta = ctx.saved_tensors
        wants_x, _, wants_bias, _, wants_delta = ctx.needs_input_grad
        part = g.index_select(1, index)  # (n, s)
        gx = sum_of_products(g, weight, part, delta).view(x.shape) if wants_x else None
        g_delta = (part.T @ x.reshape(-1, x.shape[-1])).to(delta.dtype) if wants_delta else None
        return gx, None, g.sum(0) if wants_bias else None, None, g_delta
