"""The base of a tuned model as a model of its own, without a second copy: a reference for preference training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pegbox.core.tuned import Tuned


class Reference(nn.Module):
    """The tuned model with its adapters off, without gradient; what it does not define is looked up on the base.

    It owns no parameter and no submodule, so that nothing that walks it (to move, freeze, shard or save) touches the
    model that trains.  Dropout is off.
    """

    def __init__(self, tuned: Tuned) -> None:
        super().__init__()
        self._of = (tuned,)  # a tuple, so that no module is registered
        with tuned.disabled():  # raises where there is no base to go back to
            pass

    @property
    def tuned(self) -> Tuned:
        return self._of[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not in forward: a trainer that replaces the forward is then inside as well
        modes = [(module, module.training) for module in self.tuned.modules()]
        self.tuned.eval()
        try:
            with torch.no_grad(), self.tuned.disabled():
                return super().__call__(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.tuned.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_of":
                raise
            return getattr(self.tuned.model, name)
