"""Which start of low-rank factors works under which method: found by trying each pair."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pegbox import methods
from pegbox.checks.case import small
from pegbox.checks.check import require
from pegbox.checks.lab import Lab, bits, require_close, require_same_bits
from pegbox.checks.models import FAMILIES
from pegbox.core import starts
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
    with tempfile.TemporaryDirectory() as folder:
        try:
            lab = Lab(build(cls, {**small(cls), "start": start}, what=cls.name()), family, Path(folder))
            tuned = lab.tuned()
            if lab.method.calibrates():
                lab.method.calibrate(tuned, Data([lab.batch(seed) for seed in range(4)]))
        except PegboxError as refused:
            return str(refused).partition("\n")[0]
        _works(lab, tuned, what)
    return None


def _works(lab: Lab, tuned: Tuned, what: str) -> None:
    before = bits(lab.model())
    require_close(lab.output(tuned), lab.output(lab.model()), f"{what}, at the start", AS_BASE)
    losses = lab.train(tuned, STEPS, lr=RATE, optimizer=tuned.method.optimizer(tuned.groups(RATE)))
    require(losses[-1] < losses[0], f"{what}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    want = lab.output(tuned)
    require_close(lab.output(lab.load(lab.save(tuned), lab.model())), want, f"{what}, loaded")
    if tuned.method.traits.merge == "exact":
        require_close(lab.output(tuned.merge()), want, f"{what}, merged", AS_BASE)
        tuned.unmerge()
    require_same_bits(bits(tuned.detach()), before, what)


def all_starts() -> list[str]:
    """Every start by name, the plain one first."""
    return sorted(starts.names(), key=lambda name: (name != "default", name))
