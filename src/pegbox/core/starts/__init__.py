"""Where the factors of a low-rank update start: one file for each published way, found by listing the folder.

    W' = W + s (B A - B_0 A_0)        A: (r, in)   B: (out, r)

A start that is `apart` has a B_0 A_0 that is not zero; A_0 and B_0 then stand frozen beside A and B, so that the base
stays as it is and the adapter is a change of it.  A start that `looks` is found on real batches before training.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.core.graft import low_rank_pair
from pegbox.core.settings import build

if TYPE_CHECKING:
    from pegbox.core.calibration import Data
    from pegbox.core.site import Site
    from pegbox.core.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Start:
    """One way to start; the fields are its settings."""

    apart: ClassVar[bool] = False
    looks: ClassVar[bool] = False

    def factors(self, site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) before any data is seen: as LoRA's, if a start says nothing else.

        Raises:
            SettingsError: a rank above what the site's matrix can have.
        """
        a, b = low_rank_pair(site, rank)
        return a.detach(), b.detach()

    def look(self, tuned: Tuned, name: str, data: Data) -> None:
        """Give the grafts of the adapter `name` other factors, by `StartedFactors.begin`."""


def names() -> list[str]:
    """Every start, by listing the folder; imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str, settings: Mapping[str, Any]) -> Start:
    """A start by name, with its settings.

    Raises:
        SettingsError: an unknown name or setting.
    """
    if name not in names():
        raise SettingsError(f"there is no start {name!r}{did_you_mean(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (cls,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Start) and value.__module__ == module.__name__
    )
    return build(cls, settings, what=f"start {name}")
