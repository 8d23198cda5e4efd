"""torch.compile."""

from __future__ import annotations

import torch

from pegbox.checks.check import check
from pegbox.checks.lab import Lab, every, logits, require_close


@check()
def compiles_whole(lab: Lab) -> None:
    """`torch.compile(fullgraph=True)` finds no break, and outputs and gradients are those of eager."""
    tuned = lab.shaken()
    want, gradients = lab.output(tuned), lab.gradients(tuned)
    torch._dynamo.reset()
    try:
        fast = torch.compile(tuned, fullgraph=True, backend="eager")
        out = logits(fast(**lab.batch()) if lab.family.takes_labels else fast(**lab.inputs()))
        require_close(out.detach(), want, "the compiled model")
        tuned.zero_grad()
        lab.loss(fast).backward()
        have = {k: p.grad for k, p in tuned.trainable().items() if p.grad is not None}
        every(have, gradients, require_close, "gradients of the compiled model")
    finally:
        torch._dynamo.reset()
