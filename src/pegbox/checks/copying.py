"""Copies of a tuned model."""

from __future__ import annotations

import copy

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, bits, require_different, require_equal, require_same_bits, shake


@check(on="all")
def a_copy_is_independent(lab: Lab) -> None:
    """`copy.deepcopy` of a tuned model gives the same outputs, and shares nothing with the original."""
    tuned = lab.shaken()
    want, before = lab.output(tuned), bits(tuned)
    twin = copy.deepcopy(tuned)
    require_equal(lab.output(twin), want, "the copy")
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in tuned.parameters()}
    require(not shared, f"{len(shared)} tensors belong to both")
    shake(twin, seed=3)
    require_different(lab.output(twin), want, "the copy, changed,")
    lab.gradients(twin)
    require(all(p.grad is None for p in tuned.parameters()), "training the copy gives the original gradients")
    twin.detach()
    require_same_bits(bits(tuned), before, "the original after its copy changed")
    require_equal(lab.output(tuned), want, "the original after its copy was detached")
