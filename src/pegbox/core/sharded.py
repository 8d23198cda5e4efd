"""Tensors that are spread over processes, as one process would have them."""

from __future__ import annotations

import torch
from torch import Tensor


def whole(value: Tensor) -> Tensor:
    """The tensor itself, or all of one whose parts lie in several processes, each of which must call this."""
    if not _may_be_sharded():
        return value
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if _may_be_sharded():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)


def own_part(value: Tensor) -> Tensor:
    """The tensor itself, or the part of a sharded one that this process holds; it shares memory."""
    if not _may_be_sharded():
        return value
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
