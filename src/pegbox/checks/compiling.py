"""torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pegbox.checks.check import check
from pegbox.checks.lab import Lab, every, logits, require_close
from pegbox.core.tuned import Tuned


@check()
def compiles_whole(lab: Lab) -> None:
    """`torch.compile(fullgraph=True)` finds no break, and outputs and gradients are those of eager."""
    tuned = lab.shaken()
    want, gradients = _run(lab, tuned, tuned)
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own internals
            out, have = _run(lab, tuned, torch.compile(tuned, fullgraph=True, backend="eager"))
    finally:
        torch._dynamo.reset()
    require_close(out, want, "the compiled model")
    every(have, gradients, require_close, "gradients of the compiled model")


def _run(lab: Lab, tuned: Tuned, model: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients of their mean square."""
    tuned.zero_grad()
    out = logits(model(**lab.inputs()))
    out.square().mean().backward()
    return out.detach(), {k: p.grad.clone() for k, p in tuned.trainable().items() if p.grad is not None}
