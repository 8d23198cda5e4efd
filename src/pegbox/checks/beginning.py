"""What a fresh adapter is: its start, its size, its draws."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, every, require_close, require_different, require_equal


@check(on="all")
def starts_as_declared(lab: Lab) -> None:
    """An untrained adapter leaves the outputs as they are; where traits.identity is False, it changes them."""
    want = lab.output(lab.model())
    have = lab.output(lab.tuned())
    if lab.method.traits.identity:
        require_close(have, want, "the untrained model", lab.to_base)
    else:
        require_different(have, want, "traits.identity is False, but the untrained model", at_least=1e-5)


@check(on="all")
def size_is_its_formula(lab: Lab) -> None:
    """The trained numbers are as many as `size` gives for the sites, where the method has a formula."""
    tuned = lab.tuned()
    sizes = [lab.method.size(tuned.sites[path]) for path in tuned.sites]
    adapter = tuned.adapter()
    trained = sum(p.numel() for p in adapter.own().values() if p.requires_grad)
    if None not in sizes:
        formula = sum(size or 0 for size in sizes) + lab.method.shared_size()
        require(trained == formula, f"{trained} numbers train, the formula says {formula}")
    counted = sum(p.numel() for p in tuned.trainable().values())
    require(tuned.count()[0] == counted, f"count() says {tuned.count()[0]}, trainable() holds {counted}")


@check()
def same_seed_same_bits(lab: Lab) -> None:
    """Two builds with one seed are equal bit for bit, whatever the global generator's state."""
    torch.manual_seed(1)
    first = lab.tuned().state()
    torch.manual_seed(2)
    every(lab.tuned().state(), first, require_equal, "a second build")


@check()
def other_seed_other_bits(lab: Lab) -> None:
    """Where a build draws anything, another seed gives another adapter."""
    model = lab.model()
    with _RandomOperations() as drawn:
        first = lab.tuned(model, seed=0).state()
    second = lab.tuned(seed=1).state()
    same = all(torch.equal(first[k], second[k]) for k in first)
    require(not drawn.names or not same, f"{sorted(drawn.names)} were drawn, and seeds 0 and 1 gave the same bits")


@check()
def global_generator_is_left_alone(lab: Lab) -> None:
    """Building an adapter leaves the global random generator in the state it was in."""
    model = lab.model()
    before = torch.get_rng_state()
    lab.tuned(model)
    require(torch.equal(torch.get_rng_state(), before), "the build moved the global generator")


class _RandomOperations(TorchDispatchMode):
    """Notes the names of random operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
