"""The one kernel of every low-rank method: y = W x + b + scale * up (down x), and its gradients.

    x: (..., in)   W: (out, in)   b: (out,)   down: (r, in)   up: (out, r)

What autograd would do with the plain expression costs an extra copy of x per factor, an (out,)-wide temporary for
the product and another for the sum.  Here x is kept once (tensors that several sites read, as q, k and v do, are kept
once for all of them), the scale goes into the small factor, and both sums are made in place by `addmm_`.

`down` may be a width instead of a matrix: then x is cut into shards of that width, which are summed (MiSS).
That is the same product with `down` = a row of identity matrices, at the cost of a sum.

Factors are float32 masters; products run in the dtype of x.  Where the processor multiplies float32 faster than that,
the two large products are widened, a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegbox.core.cpu import working_dtype

BLOCK_ROWS = 512  # widened at once: a few MiB, and no slower than all

Down = Tensor | int  # (r, in), or the width r of the shards


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Down, up: Tensor, scale: float) -> Tensor:
    """`F.linear(x, weight, bias)` plus a low-rank update; differentiable in every tensor.

    Args:
        x: (..., in)
        weight: (out, in), usually frozen
        bias: (out,) or None
        down: (r, in), or r to sum shards of x of that width (the last one padded with zeros)
        up: (out, r)
        scale: multiplies the update

    Returns:
        (..., out), in the dtype of x (under autocast, in autocast's).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    matrix, shard = (None, down) if isinstance(down, int) else (down, 0)
    with torch.autocast(device, enabled=False):  # it would undo the widening
        return _LowRankLinear.apply(x, weight, bias, matrix, up, scale, shard)


def low_rank_product(x: Tensor, down: Down, up: Tensor, scale: float) -> Tensor:
    """`scale * up (down x)` in plain operations, where x is not what the matrix sees: (..., in) -> (..., out)."""
    h = fold(x, down) if isinstance(down, int) else F.linear(x, down.to(x.dtype))
    return F.linear(h, (scale * up).to(x.dtype))


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
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor,
        scale: float,
        shard: int,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        h = fold(rows, shard) if down is None else rows @ down.to(x.dtype).T  # (n, r)
        y = _sum_of_products(rows, weight.T, h, (scale * up).T, bias)  # (n, out)
        ctx.save_for_backward(x, weight, down, up, h)
        ctx.scale, ctx.shard = scale, shard
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, h = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up = ctx.needs_input_grad[:5]
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        g = grad.reshape(-1, grad.shape[-1])  # (n, out)
        gh = g @ (ctx.scale * up).to(g.dtype) if wants_x or wants_down else None  # (n, r)
        gx = None
        if wants_x and gh is not None:
            factor = as_matrix(ctx.shard, x.shape[-1], up) if down is None else down
            gx = _sum_of_products(g, weight, gh, factor).view(x.shape)
        g_down = (gh.T @ rows).to(down.dtype) if wants_down and gh is not None else None
        g_up = (g.T @ h).to(up.dtype).mul_(ctx.scale) if wants_up else None
        g_weight = g.T @ rows if wants_weight else None
        g_bias = g.sum(0) if wants_bias else None
        return gx, g_weight, g_bias, g_down, g_up, None, None


def _sum_of_products(x: Tensor, w: Tensor, h: Tensor, low: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w + h @ low + bias in the dtype of x: (n, k), (k, m), (n, r), (r, m), (m,) -> (n, m)."""
    dtype = working_dtype(x)
    if dtype == x.dtype or torch.compiler.is_compiling():
        return _added(x.to(dtype), w.to(dtype), h.to(dtype), low.to(dtype), bias).to(x.dtype)
    y = x.new_empty(x.shape[0], w.shape[1])  # before what is freed again, so that no hole is left below it
    w, low = w.to(dtype), low.to(dtype)
    for part, of_h, into in zip(x.split(BLOCK_ROWS), h.split(BLOCK_ROWS), y.split(BLOCK_ROWS), strict=True):
        into.copy_(_added(part.to(dtype), w, of_h.to(dtype), low, bias))
    return y


def _added(x: Tensor, w: Tensor, h: Tensor, low: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x, w.T, None if bias is None else bias.to(x.dtype))
    return y.addmm_(h, low)


def rescale(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`factor * y + bias` per output: y (..., out), factor (out,), bias (out,) or None; in the dtype of y."""
    factor = factor.to(y.dtype)
    return y * factor if bias is None else torch.addcmul(bias.to(y.dtype), y, factor)
