"""Monarch matrices: two block-diagonal factors with a fixed permutation of channels between them.

Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", 2022 (arXiv 2204.00595).

    u_c = R_c x_c        x: (k p,) in k blocks x_c: (p,)      R: (k, q, p)
    v_b = L_b w_b        w: all of u, (k q,) = (t l,), read as (t, l) and transposed      L: (l, s, t)
    y[a l + b] = v_b[a]

Where q = l and t = k, entry by entry:  M[(a, b), (c, e)] = L[b, a, c] R[c, b, e], row a l + b, column c p + e; the
slice of one b and one c has rank 1.  With q = n l and t = n k it has rank n.  Inputs are padded to k p, outputs cut off
at l s.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def multiply(x: Tensor, right: Tensor, left: Tensor, out: int) -> Tensor:
    """M x of each row: (..., in) -> (..., out), in the dtype of x.

    Args:
        right: R (k, q, p), in at most k p
        left: L (l, s, t), l t = k q, and out at most l s
    """
    blocks_in, _, width = right.shape
    blocks_out, size, inner = left.shape
    rows = F.pad(x.reshape(-1, x.shape[-1]), (0, blocks_in * width - x.shape[-1]))
    u = torch.bmm(rows.view(-1, blocks_in, width).transpose(0, 1), right.to(x.dtype).transpose(1, 2))  # (k, n, q)
    w = u.transpose(0, 1).reshape(-1, inner, blocks_out).permute(2, 0, 1)  # (l, n, t)
    v = torch.bmm(w, left.to(x.dtype).transpose(1, 2))  # (l, n, s)
    y = v.permute(1, 2, 0).reshape(-1, size * blocks_out)
    return y[:, :out].view(*x.shape[:-1], out)


def dense(right: Tensor, left: Tensor, out: int, in_: int) -> Tensor:
    """M (out, in)."""
    return multiply(torch.eye(in_, dtype=right.dtype, device=right.device), right, left, out).T


@torch.no_grad()
def project(w: Tensor, blocks_in: int, blocks_out: int, rank: int = 1) -> tuple[Tensor, Tensor]:
    """R (k, q, p) and L (l, s, t) of the Monarch matrix nearest to `w` (out, in) in the Frobenius norm.

    Each slice of `w` that an output block and an input block share becomes its best approximation of rank `rank`, the
    singular values shared evenly between both factors; those that are left out are the error.  Padding is zero.

    Args:
        blocks_in, blocks_out: k, l
    """
    (out, in_), k, l_ = w.shape, blocks_in, blocks_out
    p, s = math.ceil(in_ / k), math.ceil(out / l_)
    padded = F.pad(w.float(), (0, k * p - in_, 0, l_ * s - out))
    slices = padded.view(s, l_, k, p).permute(2, 1, 0, 3)  # (k, l, s, p)
    u, sigma, vt = torch.linalg.svd(slices, full_matrices=False)
    n = min(rank, sigma.shape[-1])
    root = F.pad(sigma[..., :n].sqrt(), (0, rank - n))
    ups = F.pad(u[..., :n], (0, rank - n)) * root[..., None, :]  # (k, l, s, rank)
    downs = root[..., None] * F.pad(vt[..., :n, :], (0, 0, 0, rank - n))  # (k, l, rank, p)
    # channel n of the pair (c, b) is number n l + b of R_c, and number c rank + n of L_b
    right = downs.transpose(1, 2).reshape(k, rank * l_, p)
    return right.contiguous(), ups.permute(1, 2, 0, 3).reshape(l_, s, k * rank).contiguous()
