"""Several processes go on from one calibration.

Each has looked at batches of its own before training, and may have found other factors, other ranks, other sites.  The
first process's are taken by all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pegbox.core import Method, Tuned


@torch.no_grad()
def take_the_firsts(tuned: Tuned) -> None:
    """Settings and values of the adapters in use, as the first process has them; nothing where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for name in tuned.active:
        own = tuned.adapter(name).method
        held: list[Method] = [own]
        dist.broadcast_object_list(held)
        if held[0] != own:
            tuned.remake(name, held[0])
        for value in tuned.adapter(name).own_state().values():
            whole = value.detach().contiguous()
            dist.broadcast(whole, src=0)
            value.copy_(whole)
