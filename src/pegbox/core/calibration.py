"""What a method may look at before training: real batches, as often as it likes, and their loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pegbox.core.errors import MethodError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


class Data:
    """Batches, and the loss that training will have.

    Args:
        batches: a collection that can be gone through again, or an iterator, of which as much is kept as was read.
        loss: of the model on a batch; the `loss` of the model's output if None.
    """

    def __init__(self, batches: Iterable[Batch], loss: Loss | None = None) -> None:
        self._again = _Kept(batches) if isinstance(batches, Iterator) else batches
        self._loss = loss

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._again)

    def cycle(self, most: int) -> Iterator[Batch]:
        """So many batches, from the beginning again where there are fewer."""
        count = 0
        while count < most:
            before = count
            for batch in itertools.islice(self, most - count):
                count += 1
                yield batch
            if count == before:
                raise MethodError("a method looks at data before training, and there is no batch to look at")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar that can be differentiated."""
        if self._loss is not None:
            return self._loss(model, batch)
        loss: Tensor | None = getattr(model(**batch), "loss", None)
        if loss is None:
            raise MethodError(
                "a method takes gradients before training, and the model's output has no loss: give batches with "
                "labels, or calibrate(batches, loss=...), a function of model and batch"
            )
        return loss


class _Kept:
    """An iterator that can be gone through again."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._left, self._read = batches, list[Batch]()

    def __iter__(self) -> Iterator[Batch]:
        yield from self._read
        for batch in self._left:
            self._read.append(batch)
            yield batch
