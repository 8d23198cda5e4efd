"""Draws that neither move nor see the global generators."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw from generators of this seed, and leave the global ones as they were.

    `torch.manual_seed` would do too, but writes down where it was called from each time, for GPUs that are not there.
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.extend(torch.cuda.default_generators)
    states = [g.get_state() for g in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seeded(seed: int, word: str) -> contextlib.AbstractContextManager[None]:
    """Draw from a seed that is made of a seed and a word."""
    return drawn_from(int.from_bytes(hashlib.sha256(f"{seed}/{word}".encode()).digest()[:7], "little"))
