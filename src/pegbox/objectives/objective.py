"""What an objective is: its loss, what its loss is a mean over, and what to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]
Losses = dict[str, Tensor]
Predictions = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """An objective; called, it is its loss.

    Attributes:
        name: as in `pegbox.objectives.NAMES`
        loss: (model, batch, **options) -> named losses; their sum is the loss, a mean unless `num_items` is given
        count: (batch, **options) -> what the mean divides by.  The sum over all batches of an optimizer step, given
            as `num_items`, makes accumulated gradients those of the whole.
        predict: (model, batch) -> tensors with one row an example (or token), without gradient; concatenate them
            over batches and give them to `measure`
        measure: predictions -> named numbers
        best: the number that decides which model is better
        higher_is_better: whether more of it is better
    """

    name: str
    loss: Callable[..., Losses]
    count: Callable[..., Tensor]
    predict: Callable[[nn.Module, Batch], Predictions]
    measure: Callable[[Predictions], dict[str, float]]
    best: str
    higher_is_better: bool

    def __call__(self, model: nn.Module, batch: Batch, **options: Any) -> Losses:
        return self.loss(model, batch, **options)
