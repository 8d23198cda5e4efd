"""What grafts know beyond their inputs: one explicit object, shared by every site of a tuned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pegbox.core.method import Anatomy
    from pegbox.core.mixture import Route


@dataclass
class Context:
    """Set around a forward, read by sites and grafts.

    Attributes:
        anatomy: the roles of the base.
        bare: the grafts are off and the model is the base.
        rows: the adapter of each row of the batch (None: the base), or None when one plan holds for all rows.
        padding: positions that pad the start of each row, while rows of different prompts share a pass.
        losses: terms that grafts add to the loss during a forward, by name; the engine reads and empties them.
        given: what a caller hands to grafts beside the model's inputs, by a name in `Method.reads`: a hint image, a
            scale.  Tensors have a row for each of the batch, or one for all.
        mask: (B, T) of the batch, not zero where a position is no padding; None where modules see other positions
            each, as an encoder and its decoder do, or where nothing is said.
        routes: of the mixtures in the last forward that made gradients, by path; emptied with `losses`.
        called: paths of the sites that ran or were read, while someone listens.
    """

    anatomy: Anatomy
    bare: bool = False
    rows: tuple[str | None, ...] | None = None
    padding: tuple[int, ...] = ()
    losses: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    routes: dict[str, Route] = field(default_factory=dict)
    called: set[str] | None = None

    def read(self, name: str, default: Any = None, *, like: Tensor | None = None) -> Any:
        """What was given under a name, `default` if nothing; tensors on the device and in the dtype of `like`."""
        value = self.given.get(name, default)
        return value if like is None else _as(value, like)

    def mask_of(self, values: Tensor) -> Tensor | None:
        """(...) bool for values (..., n) of each position; None where no mask fits them."""
        if self.mask is None or self.mask.shape != values.shape[:-1]:
            return None
        return self.mask.to(values.device).bool()


def _as(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: _as(part, like) for name, part in value.items()}
    return value
