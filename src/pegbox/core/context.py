"""What grafts know beyond their inputs: one explicit object, shared by every site of a tuned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pegbox.core.method import Anatomy


@dataclass
class Context:
    """Set around a forward, read by sites and grafts.

    Attributes:
        anatomy: the roles of the base.
        bare: the grafts are off and the model is the base.
        rows: the adapter of each row of the batch (None: the base), or None when one plan holds for all rows.
        losses: terms that grafts add to the loss during a forward, by name; the engine reads and empties them.
    """

    anatomy: Anatomy
    bare: bool = False
    rows: tuple[str | None, ...] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
