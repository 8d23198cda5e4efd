"""The one kernel of every low-rank method: y = W x + b + scale * up (gate * down x), and its gradients.

    x: (..., in)   W: (out, in)   b: (out,)   down: (r, in)   up: (out, r)   gate: (..., r), or none

What autograd would do with the plain expression costs an extra copy of x per factor, an (out,)-wide temporary for
the product and another for the sum.  Here x is kept once (tensors that several sites read, as q, k and v do, are kept
once for all of them), the scale goes into the small factor, and both sums are made in place by `addmm_`.

`down` may be a width instead of a matrix: then x is cut into shards of that width, which are summed (MiSS).
That is the same product with `down` = a row of identity matrices, at the cost of a sum.

A gate says how much of each direction a row of x gets: factors of several experts, stacked, with zeros for those that
are not chosen, are one product for all of them.

Factors are float32 masters; products run in the dtype of x.  Where the processor multiplies float32 faster than that,
the two large products are widened, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegbox.core.cpu import working_dtype

BLOCK_ROWS = 512  # widened at once: a few MiB, and no slower than all

Down = Tensor | int  # (r, in), or the width r of the shards
Matrix = Tensor | Callable[[], Tensor]  # (out, in), or what decodes it, anew each time it is called


def linear(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)`; a frozen matrix that is decoded is decoded again in the backward, and not kept."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    dtype = _autocast_dtype(x)
    return _DecodedLinear.apply(x if dtype is None else x.to(dtype), bias, weight)


def low_rank_linear(
    x: Tensor, weight: Matrix, bias: Tensor | None, down: Down, up: Tensor, scale: float, gate: Tensor | None = None
) -> Tensor:
    """`F.linear(x, weight, bias)` plus a low-rank update; differentiable in every tensor.

    Args:
        x: (..., in)
        weight: (out, in), usually frozen; what decodes it is called in the forward and again in the backward
        bias: (out,) or None
        down: (r, in), or r to sum shards of x of that width (the last one padded with zeros)
        up: (out, r)
        scale: multiplies the update
        gate: (..., r), multiplies `down x`

    Returns:
        (..., out), in the dtype of x (under autocast, in autocast's).
    """
    kept, decode = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        kept = None if kept is None else kept.to(dtype)
    matrix, shard = (None, down) if isinstance(down, int) else (down, 0)
    with torch.autocast(x.device.type, enabled=False):  # it would undo the widening
        y = _LowRankLinear.apply(x, kept, bias, matrix, up, gate, scale, shard, decode)  # (n, out)
    return y.view(*x.shape[:-1], y.shape[-1])  # out here, or what changes its views in place (DeBERTa) is forbidden to


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def low_rank_product(x: Tensor, down: Down, up: Tensor, scale: float, gate: Tensor | None = None) -> Tensor:
    """The update alone, in plain operations, where x is not what the matrix sees: (..., in) -> (..., out)."""
    h = fold(x, down) if isinstance(down, int) else F.linear(x, down.to(x.dtype))
    return F.linear(_gated(h, gate), (scale * up).to(x.dtype))


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else h * gate.to(h.dtype)


def fold(x: Tensor, width: int) -> Tensor:
    """Sum the shards of x: (..., in) -> (..., width); the last shard is padded with zeros."""
    missing = -x.shape[-1] % width
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, width)).sum(-2)


def as_matrix(down: Down, in_features: int, like: Tensor) -> Tensor:
    """`down` as a matrix (r, in): shards become a row of identities."""
    if isinstance(down, Tensor):
        return down
    eye = torch.eye(down, dtype=like.dtype, device=like.device)
    return eye.repeat(1, -(-in_features // down))[:, :in_features]


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor,
        gate: Tensor | None,
        scale: float,
        shard: int,
        decode: Callable[[], Tensor] | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        gate = None if gate is None else gate.reshape(-1, gate.shape[-1])  # (n, r)
        h = fold(rows, shard) if down is None else rows @ down.to(x.dtype).T  # (n, r)
        w = _decoded(weight, decode, x)
        y = sum_of_products(rows, w.T, _gated(h, gate), (scale * up).T, bias)  # (n, out)
        ctx.save_for_backward(x, weight, down, up, gate, h)
        ctx.scale, ctx.shard, ctx.decode = scale, shard, decode
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gate, h = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, wants_gate = ctx.needs_input_grad[:6]
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        g = grad.reshape(-1, grad.shape[-1])  # (n, out)
        gh = g @ (ctx.scale * up).to(g.dtype) if wants_x or wants_down or wants_gate else None  # (n, r)
        g_gate = (gh * h).to(gate.dtype).view(*x.shape[:-1], -1) if wants_gate and gh is not None else None
        gh = None if gh is None else _gated(gh, gate)
        gx = None
        if wants_x and gh is not None:
            factor = as_matrix(ctx.shard, x.shape[-1], up) if down is None else down
            gx = sum_of_products(g, _decoded(weight, ctx.decode, g), gh, factor).view(x.shape)
        g_down = (gh.T @ rows).to(down.dtype) if wants_down and gh is not None else None
        g_up = (g.T @ _gated(h, gate)).to(up.dtype).mul_(ctx.scale) if wants_up else None
        g_weight = g.T @ rows if wants_weight else None
        g_bias = g.sum(0) if wants_bias else None
        return gx, g_weight, g_bias, g_down, g_up, g_gate, None, None, None


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor:
        ctx.decode, ctx.bias_dtype = decode, None if bias is None else bias.dtype
        return F.linear(x, decode().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_bias = ctx.needs_input_grad[:2]
        gx = grad @ ctx.decode().to(grad.dtype) if wants_x else None
        return gx, grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if wants_bias else None, None


def _decoded(weight: Tensor | None, decode: Callable[[], Tensor] | None, like: Tensor) -> Tensor:
    if decode is not None:
        return decode().to(like.dtype)
    assert weight is not None
    return weight


def sum_of_products(
    x: Tensor, w: Tensor, h: Tensor | None = None, low: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x @ w + h @ low + bias in the dtype of x: (n, k), (k, m), (n, r), (r, m), (m,) -> (n, m)."""
    dtype = working_dtype(x)
    low = None if low is None else low.to(dtype)
    if dtype == x.dtype or torch.compiler.is_compiling():
        return _added(x.to(dtype), w.to(dtype), h, low, bias).to(x.dtype)
    y = x.new_empty(x.shape[0], w.shape[1])  # before what is freed again, so that no hole is left below it
    w = w.to(dtype)
    for at in range(0, len(x), BLOCK_ROWS):
        block = slice(at, at + BLOCK_ROWS)
        y[block] = _added(x[block].to(dtype), w, None if h is None else h[block], low, bias)
    return y


def _added(x: Tensor, w: Tensor, h: Tensor | None, low: Tensor | None, bias: Tensor | None) -> Tensor:
    y = F.linear(x, w.T, None if bias is None else bias.to(x.dtype))
    return y if h is None or low is None else y.addmm_(h.to(x.dtype), low)


def rescale(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`factor * y + bias` per output: y (..., out), factor (out,), bias (out,) or None; in the dtype of y."""
    factor = factor.to(y.dtype)
    return y * factor if bias is None else torch.addcmul(bias.to(y.dtype), y, factor)
