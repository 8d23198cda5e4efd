"""Which start of low-rank factors works under which method: found by trying each pair."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pegbox import anatomy, methods
from pegbox.checks.case import small
from pegbox.checks.check import require
from pegbox.checks.lab import logits, require_close, require_same_bits
from pegbox.checks.models import FAMILIES, inputs
from pegbox.core import files, starts
from pegbox.core.calibration import Data
from pegbox.core.errors import PegboxError
from pegbox.core.low_rank_start import LowRankMethod
from pegbox.core.settings import build
from pegbox.core.tuned import Tuned

FAMILY, STEPS, RATE = "llama", 8, 1e-2
AS_BASE = 1e-4  # of the largest output


def low_rank_methods() -> Iterator[type[LowRankMethod]]:
    """The methods that take a start, by name."""
    for name in methods.names():
        cls = methods.get(name)
        if issubclass(cls, LowRankMethod):
            yield cls


def outcome(cls: type[LowRankMethod], start: str) -> str | None:
    """Start, train, save, load, merge: None if all of it holds, else why the method refused.

    Raises:
        CheckFailed: it neither refused nor worked.
    """
    family, what = FAMILIES[FAMILY], f"{cls.name()} from start={start}"
    torch.manual_seed(0)
    model = family.build().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        base = logits(model(**inputs(family.batch(0))))
    try:
        method = build(cls, {**small(cls), "start": start}, what=cls.name())
        tuned = Tuned(model, anatomy.of(model), method).eval()
        if method.calibrates():
            method.calibrate(tuned, Data([family.batch(seed) for seed in range(4)]))
    except PegboxError as refused:
        return str(refused).partition("\n")[0]
    require_close(_output(tuned, family), base, f"{what}, at the start", AS_BASE)
    _train(tuned, family, what)
    _saved(tuned, family, what)
    if tuned.method.traits.merge == "exact":
        want = _output(tuned, family)
        require_close(_output(tuned.merge(), family), want, f"{what}, merged", AS_BASE)
        tuned.unmerge()
    require_same_bits(dict(tuned.detach().state_dict()), before, what)
    return None


@torch.no_grad()
def _output(model: Any, family: Any) -> Tensor:
    return logits(model(**inputs(family.batch(0))))


def _train(tuned: Tuned, family: Any, what: str) -> None:
    optimizer = tuned.method.optimizer(tuned.groups(RATE)) or torch.optim.AdamW(tuned.groups(RATE))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = family.loss(tuned, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    require(losses[-1] < losses[0], f"{what}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")


def _saved(tuned: Tuned, family: Any, what: str) -> None:
    want = _output(tuned, family)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        torch.manual_seed(0)
        model = family.build().eval()
        again = Tuned(model, anatomy.of(model))
        file = methods.read(Path(folder), model)
        files.put(file, again, methods.get(file.method), "default")
        require_close(_output(again.eval(), family), want, f"{what}, loaded")


def all_starts() -> list[str]:
    """Every start by name, the plain one first."""
    return sorted(starts.names(), key=lambda name: (name != "default", name))
