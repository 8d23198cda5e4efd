"""Causal attention on a CPU, in blocks whose scores stay in its cache.

    P = softmax(mask(s * Q K^T))    O = P V
    dV = P^T dO    dP = dO V^T    dS = P * (dP - sum(dP * P))    dQ = s * dS K    dK = s * dS^T Q

    Q, dO: (B, H, T, D)   K, V: (B, G, T, D), each for H / G heads   s: scale

A block is BLOCK queries of a few rows with the keys up to their own, so half of the scores are never made, and nothing
of size T x T is kept: the backward pass makes the block's P again.  Products are in the dtype of Q, sums over blocks in
float32.  PyTorch's own CPU kernel makes its backward products in float32 and takes four to six times as long with
bfloat16 (2 cores with AVX512-BF16, B 16, H 4, T 512, D 64).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pegbox.core.cpu import multiplies_bf16

BLOCK = 64  # queries; larger blocks waste more of the diagonal and leave the cache earlier
CACHE = 1 << 20  # bytes of scores at once, a thread: about its second-level cache


def in_blocks(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, where the model trains in bfloat16 on a CPU, its causal attention of whole rows is that of this file.

    It is the model's own call of PyTorch's attention that is answered so.  Nothing changes for one that recomputes its
    blocks in the backward pass, which must then find the same operations, nor where it is not known whether it does.
    """
    if _recomputes(model) or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not multiplies_bf16():
        return contextlib.nullcontext()
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu":
        return contextlib.nullcontext()
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else first.dtype
    return _InBlocks() if dtype == torch.bfloat16 else contextlib.nullcontext()


def _recomputes(model: nn.Module) -> bool:
    """Whether blocks may run again in the backward pass; so it is said of a model that does not tell."""
    flags = ("is_activation_checkpointing", "is_gradient_checkpointing")  # transformers' name from 5.2 on, and before
    return bool(next((getattr(model, flag) for flag in flags if hasattr(type(model), flag)), True))


class _InBlocks(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plain(*args, **kwargs):
            return _answered(*args, **kwargs)
        return func(*args, **kwargs)


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    whole = query.ndim == 4 and query.shape[-2] == key.shape[-2] and query.shape[-1] == value.shape[-1]
    return whole and is_causal and attn_mask is None and not dropout_p and query.device.type == "cpu"


def _answered(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    return causal_attention(query, key, value, scale).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """What each query reads from the keys up to its own position; differentiable once.

    Args:
        query: (B, H, T, D)
        key, value: (B, G, T, D), H a multiple of G
        scale: of the scores; 1 / sqrt(D) if None

    Returns:
        (B, T, H, D), in the dtype of `query`, or that of autocast.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings are float32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    out: Tensor = _forward(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return out


@torch.library.custom_op("pegbox::causal_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = _grouped(query * scale, key), key.contiguous(), value.contiguous()
    b, kv, g, t, d = q.shape
    out = q.new_empty(b, t, kv, g, d)
    for rows, start, end in _blocks(q):
        p = _probabilities(_flat(q[rows, :, :, start:end]), _flat(k[rows])[:, :end], start)
        o = torch.bmm(p, _flat(v[rows])[:, :end])
        out[rows, start:end] = o.view(-1, kv, g, end - start, d).permute(0, 3, 1, 2, 4)
    return out.view(b, t, kv * g, d)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    b, h, t, d = query.shape
    return query.new_empty(b, t, h, d)


@torch.library.custom_op("pegbox::causal_attention_backward", mutates_args=())
def _backward(error: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _grouped(query * scale, key), key.contiguous(), value.contiguous()
    b, kv, g, t, d = q.shape
    do = error.view(b, t, kv, g, d).permute(0, 2, 3, 1, 4)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(k, dtype=torch.promote_types(k.dtype, torch.float32)) for _ in range(2))
    for rows, start, end in _blocks(q):
        x, y = _flat(q[rows, :, :, start:end]), _flat(do[rows, :, :, start:end])
        keys, values = _flat(k[rows])[:, :end], _flat(v[rows])[:, :end]
        p = _probabilities(x, keys, start)
        _flat(dv[rows])[:, :end] += torch.bmm(p.transpose(1, 2), y)
        ds = torch._softmax_backward_data(torch.bmm(y, values.transpose(1, 2)), p, -1, p.dtype)
        dq[rows, :, :, start:end] = torch.bmm(ds, keys).view(-1, kv, g, end - start, d)
        _flat(dk[rows])[:, :end] += torch.bmm(ds.transpose(1, 2), x)
    return dq.mul_(scale).view(query.shape), dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(error: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    query, key, value, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value)


def _gradients(ctx: torch.autograd.function.FunctionCtx, error: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = _backward(error.contiguous(), *ctx.saved_tensors, ctx.scale)  # type: ignore[attr-defined]
    return dq, dk, dv, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, G, H / G, T, D), contiguous."""
    b, _, t, d = query.shape
    return query.contiguous().view(b, key.shape[1], -1, t, d)


def _flat(x: Tensor) -> Tensor:
    """(r, G, [H / G,] t, D) -> (r G, [H / G] t, D); a view where there is nothing to join but rows and groups."""
    return x.flatten(0, 1) if x.ndim == 4 else x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _blocks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Rows, first query and the one after the last of each block."""
    b, kv, g, t, _ = q.shape
    rows = max(1, CACHE * torch.get_num_threads() // (kv * g * min(BLOCK, t) * t * q.element_size()))
    for row in range(0, b, rows):
        for start in range(0, t, BLOCK):
            yield slice(row, row + rows), start, min(t, start + BLOCK)


def _probabilities(queries: Tensor, keys: Tensor, start: int) -> Tensor:
    """(n, g t, D), (n, L, D) -> (n, g t, L): t queries of g heads, of which the first is at position `start`."""
    p = torch.bmm(queries, keys.transpose(1, 2))
    size = keys.shape[1] - start
    later = torch.full((size, size), -math.inf, dtype=p.dtype, device=p.device).triu_(1)
    p.view(-1, size, keys.shape[1])[..., start:] += later
    return torch.softmax(p, -1, out=p)
