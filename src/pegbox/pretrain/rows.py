"""Texts as rows of equal length: each text is `<s> ... </s>`, texts follow each other, no row is padded.

A row starts with `<s>`; where a text is divided, its next part starts with `<s>` too.  There is no mask between the
texts of a row: a text sees those before it across `</s><s>`.  Without a mask, attention is plain causal attention,
whose fused kernels are the fastest, on CPUs above all; that the text before has nothing to say is quickly learned.

Best fit: Ding et al., "Fewer Truncations Improve Language Modeling", 2024 (arXiv 2404.10830), over a buffer as in
nanochat.  nanochat throws away what it cuts off (a third of all tokens at 2048); here it waits for another row, so that
a small corpus is used whole.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint32]


@dataclass
class Waiting:
    """What a packer has taken and not yet given.  After any row, it is all that is needed to go on from there.

    Attributes:
        pieces: tokens of texts, or of parts of them, in no row yet.
        texts: how many were taken.
        tokens: of these, `</s>` included and `<s>` not.
        cuts: times that a text was divided.
        lost: tokens at the very end, too few to fill a row.
    """

    pieces: list[Tokens] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    cuts: int = 0
    lost: int = 0

    @property
    def size(self) -> int:
        """Places of a row that the pieces take, with a `<s>` each."""
        return sum(map(len, self.pieces)) + len(self.pieces)


def best_fit(
    texts: Iterable[Sequence[int]], length: int, bos: int, buffer: int = 1000, waiting: Waiting | None = None
) -> Iterator[Tokens]:
    """Rows, each filled with the longest waiting piece that fits, again and again; if none does, the longest is cut.

    Args:
        texts: tokens of each, `</s>` at the end and no `<s>`.  A text longer than a row is divided into whole rows
            and a rest.
        length: T, tokens of a row.
        bos: id of `<s>`.
        buffer: pieces that wait to be chosen from; memory holds them.
        waiting: state to go on from, with `texts` from its `texts`-th on; kept up to date.

    Yields:
        (T,).  `tokens` taken = tokens in rows other than `<s>` + `waiting.lost`, once all have been read.
    """
    state = Waiting() if waiting is None else waiting

    def put(piece: Tokens) -> None:
        bisect.insort(state.pieces, piece, key=len)

    def take(room: int) -> Tokens:
        fitting = bisect.bisect_right(state.pieces, room, key=len)
        longest = len(state.pieces[fitting - 1])  # of all, where none fits
        return state.pieces.pop(bisect.bisect_left(state.pieces, longest, key=len))  # the one that waits longest

    def add(text: Tokens) -> None:
        parts = [text[at : at + length - 1] for at in range(0, len(text), length - 1)]
        state.cuts += max(0, len(parts) - 1)
        for part in parts:
            put(part)

    yield from _rows(texts, length, bos, state, buffer, add, take, put)


def concatenate(
    texts: Iterable[Sequence[int]], length: int, bos: int, waiting: Waiting | None = None
) -> Iterator[Tokens]:
    """Rows of the texts as they come, the last of a row divided.  Arguments and rows as of `best_fit`."""
    state = Waiting() if waiting is None else waiting

    def put(rest: Tokens) -> None:
        state.pieces.insert(0, rest)

    def take(room: int) -> Tokens:
        return state.pieces.pop(0)

    yield from _rows(texts, length, bos, state, 0, state.pieces.append, take, put)


def _rows(
    texts: Iterable[Sequence[int]],
    length: int,
    bos: int,
    state: Waiting,
    buffer: int,
    add: Callable[[Tokens], None],
    take: Callable[[int], Tokens],
    put: Callable[[Tokens], None],
) -> Iterator[Tokens]:
    """Add a text whenever no more than `buffer` pieces wait, or too few for a row."""
    for text in texts:
        while len(state.pieces) > buffer and state.size >= length:
            yield _row(length, bos, state, take, put)
        state.texts += 1
        state.tokens += len(text)
        if len(text):
            add(np.asarray(text, dtype=np.uint32))
    while state.size >= length:
        yield _row(length, bos, state, take, put)
    state.lost += sum(map(len, state.pieces))  # a state that was at its end already stays as it is
    state.pieces.clear()


def _row(length: int, bos: int, state: Waiting, take: Callable[[int], Tokens], put: Callable[[Tokens], None]) -> Tokens:
    row = np.full(length, bos, dtype=np.uint32)
    at = 0
    while (room := length - at - 1) > 0:  # beside a `<s>`; a last place without room for more stays a `<s>`
        piece = take(room)
        if len(piece) > room:
            state.cuts += 1
            put(piece[room:].copy())  # a view would keep the whole text
            piece = piece[:room]
        row[at + 1 : at + 1 + len(piece)] = piece
        at += 1 + len(piece)
    return row
