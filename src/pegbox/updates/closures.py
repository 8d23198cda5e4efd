"""What every optimizer does with a closure."""

from __future__ import annotations

from collections.abc import Callable

import torch


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss that a closure makes, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
