"""Which row is trained on when: a pure function of a number, so that a run resumes, skips and goes back at will.

Of `total` rows each source gets its weight's share, rounded by largest remainder.  Shuffled, the rows are cut into
blocks of about 1024; block b of n takes of source s the rows from floor(N_s b / n + phase_s) to the same of b + 1, so
that the shares hold all along, and within a block the sources are in random order.  In blocks, source follows source
(Yang et al., "MindLLM", 2023, arXiv 2310.15777, found that to harm a base).  Either way a source is read in epochs,
each in an order of its own, and no row comes again before all others of its source have come.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pegbox.core.errors import DataError
from pegbox.pretrain.shards import Shards

BLOCK = 1024  # rows


@dataclass(frozen=True)
class _Block:
    """Rows `begin` to `end` in their order: the source of each, and how many of that source come before it."""

    begin: int
    end: int
    sources: NDArray[np.int64]
    ranks: NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """`mixture[i]` is (source, row), for any i from 0 on; after `total` of them the shares are met again, and so on.

    Meant to be read onwards: memory holds one permutation of each source, 4 bytes a row, and the order of one block.

    Attributes:
        counts: rows that each source has.
        weights: of each source, of any sum.
        total: rows in which the shares are met, each within one row.
    """

    counts: Mapping[str, int]
    weights: Mapping[str, float]
    total: int
    seed: int = 0
    order: Literal["shuffled", "blocks"] = "shuffled"
    _epochs: dict[int, tuple[int, NDArray[np.uint32]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _blocks: list[_Block] = field(default_factory=list, init=False, repr=False, compare=False)  # the last one read

    def __post_init__(self) -> None:
        empty = [name for name, count in self.counts.items() if count < 1]
        if empty or not self.counts:
            raise DataError(f"no rows to draw from in {', '.join(map(repr, empty)) or 'a mixture of no sources'}")

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> tuple[str, int]:
        if index < 0:
            raise IndexError(f"row {index} of a mixture; rows count from 0")
        source, rank = self._in_blocks(index) if self.order == "blocks" else self._shuffled(index)
        epoch, at = divmod(rank, self.counts[self._names[source]])
        return self._names[source], int(self._permutation(source, epoch)[at])

    @cached_property
    def drawn(self) -> dict[str, int]:
        """Rows of each source in the first `total`."""
        exact = {name: self.total * self.weights[name] / self._weight for name in self.counts}
        rounded = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(self.counts, key=lambda name: rounded[name] - exact[name])
        for name in by_remainder[: self.total - sum(rounded.values())]:
            rounded[name] += 1
        return rounded

    @cached_property
    def _weight(self) -> float:
        return sum(self.weights[name] for name in self.counts)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.counts)

    def _in_blocks(self, index: int) -> tuple[int, int]:
        turn, at = divmod(index, self.total)
        drawn = list(self.drawn.values())
        ends = np.cumsum(drawn).tolist()
        source = bisect.bisect_right(ends, at)
        return source, turn * drawn[source] + at - (ends[source] - drawn[source])

    def _shuffled(self, index: int) -> tuple[int, int]:
        block = self._blocks[0] if self._blocks else None
        if block is None or not block.begin <= index < block.end:
            block = self._make(self._find(index))
            self._blocks[:] = [block]
        at = index - block.begin
        return int(block.sources[at]), int(block.ranks[at])

    @cached_property
    def _count(self) -> int:
        """Blocks of the first `total` rows."""
        return max(1, round(self.total / BLOCK))

    @cached_property
    def _phases(self) -> tuple[int, ...]:
        """Of each source, in [0, blocks); else small sources would all have their rows in the same blocks."""
        return tuple(int(_random(1, self.seed, 2, _number(name))[0]) % self._count for name in self._names)

    def _starts(self, block: int) -> list[int]:
        """Rows of each source before a block."""
        drawn = self.drawn.values()
        return [(n * block + phase) // self._count for n, phase in zip(drawn, self._phases, strict=True)]

    def _find(self, index: int) -> int:
        """The block that a row is in; the guess is off by few, as starts are by less than a row of each source."""
        block = index * self._count // self.total
        while sum(self._starts(block)) > index:
            block -= 1
        while sum(self._starts(block + 1)) <= index:
            block += 1
        return block

    def _make(self, block: int) -> _Block:
        starts, ends = self._starts(block), self._starts(block + 1)
        sources = np.repeat(np.arange(len(starts)), np.subtract(ends, starts))
        sources = sources[_order(len(sources), self.seed, 1, block)]
        ranks = np.empty_like(sources)
        for source, (start, end) in enumerate(zip(starts, ends, strict=True)):
            ranks[sources == source] = np.arange(start, end)
        return _Block(sum(starts), sum(ends), sources, ranks)

    def _permutation(self, source: int, epoch: int) -> NDArray[np.uint32]:
        held = self._epochs.get(source)
        if held is None or held[0] != epoch:
            name = self._names[source]
            order = _order(self.counts[name], self.seed, 0, _number(name), epoch).astype(np.uint32)
            held = self._epochs[source] = (epoch, order)
        return held[1]


class RowDataset(Dataset[dict[str, Tensor]]):
    """Rows of shards in the order of a mixture: item i is `input_ids` and `labels`, (T,) int64 each and the same.

    Its length is the mixture's `total`; items beyond exist as the mixture's do, for runs that skip some.
    """

    def __init__(self, shards: Shards, mixture: Mixture) -> None:
        self.mixture = mixture
        self.rows = {name: shards.rows(name) for name in mixture.counts}

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, row = self.mixture[index]
        ids = torch.from_numpy(self.rows[name][row].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def _random(count: int, *seeds: int) -> NDArray[np.uint64]:
    """Raw bits, which numpy keeps the same across its versions, as it does not keep `shuffle` and `permutation`."""
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)


def _order(count: int, *seeds: int) -> NDArray[np.int64]:
    """A random permutation."""
    return np.argsort(_random(count, *seeds), kind="stable")
