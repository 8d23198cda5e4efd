"""Float32 masters over a bfloat16 base."""

from __future__ import annotations

import torch
from torch import nn

from pegbox.checks.check import check, require
from pegbox.checks.lab import BF16, Lab, logits, require_near


@check(on="all")
def masters_stay_float32(lab: Lab) -> None:
    """On a bfloat16 base outputs are bfloat16, and near float32's unless traits.routed; the adapter's tensors and
    gradients stay float32."""
    want = lab.output(lab.shaken(lab.model().bfloat16().float()))
    tuned = lab.shaken(lab.model().bfloat16())
    out = logits(tuned(**lab.inputs(dtype=torch.bfloat16)))
    require(out.dtype == torch.bfloat16, f"outputs are {out.dtype}")
    if not lab.method.traits.routed:
        require_near(out.detach(), want, "the bfloat16 model", 3 * BF16)
    _require_float32(tuned, "on a bfloat16 base")
    out.float().square().mean().backward()
    kinds = {str(p.grad.dtype) for p in tuned.adapter().own().values() if p.grad is not None}
    require(kinds <= {"torch.float32"}, f"gradients of masters are {kinds}")
    require(all(p.grad is not None for p in tuned.trainable().values()), "a trained tensor gets no gradient")
    _require_float32(tuned.to(torch.bfloat16), "after to(bfloat16)")


def _require_float32(tuned: nn.Module, what: str) -> None:
    adapters: nn.Module = tuned.adapters  # type: ignore[assignment]
    kinds = {str(v.dtype) for v in adapters.state_dict().values() if v.is_floating_point()}
    require(kinds <= {"torch.float32"}, f"{what}, the adapter's tensors are {kinds}")
