"""The smallest things a method can be put on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES
from pegbox.core import Graft, Method, Tuned


def linear(out: int, in_: int, *, bias: bool = False) -> nn.Module:
    """One matrix, named `lin`."""
    torch.manual_seed(0)
    return nn.Sequential().append(nn.Linear(in_, out, bias=bias))


def on_linear(
    method: Method, out: int, in_: int, *, bias: bool = False, seed: int | None = 1
) -> tuple[Tuned, Graft, Tensor]:
    """A method on one matrix, with random values unless `seed` is None: the tuned model, its graft and W (out, in)."""
    model = linear(out, in_, bias=bias)
    tuned = pegbox.tune(model, method)
    if seed is not None:
        shake(tuned, seed)
    (graft,) = (g for g in tuned.adapter().grafts.values() if isinstance(g, Graft))
    weight: Tensor = model[0].weight  # type: ignore[index, assignment]
    return tuned, graft, weight.detach()


def family(name: str) -> Any:
    """A tiny model of a family, always the same."""
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()
