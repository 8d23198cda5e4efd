"""An order of rows in which batches hold rows of similar length, drawn anew each epoch from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from pegbox.data.collate import length_grouped


class SimilarLengths(Sampler[int]):
    """Indices, batch after batch; a resumed epoch has the order of the interrupted one.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the order; the epoch is added to it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches = length_grouped(self.lengths, self.batch_size, seed=self.seed + self.epoch)
        batches.sort(key=len, reverse=True)  # stable: only the short batch moves, to the end
        return (index for batch in batches for index in batch)
