"""The learning rates that a comparison tries: as many for every method, on a logarithmic grid around its usual rate.

Centres are the middle of what papers and libraries use: adapters that start from nothing take about 1e-3 on models of
this size, training the base's own tensors ten times less, and methods that train vectors alone three times more.
A winner at the edge of its grid is reported as such: a better rate may lie beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pegbox.core.method import Method

RATIO = 10**0.5  # of neighbours: two a decade
BASE, ADAPTER = 5e-5, 1e-3  # Devlin et al. (2018) tune BERT at 2e-5 to 5e-5
CENTRES = {
    "bitfit": 3e-3,
    "ia3": 3e-3,
    "compacter": 3e-3,
    "miss": 3e-4,
    "bat": 3e-4,
    "prefix_tuning": 1e-2,
    "prompt_tuning": 3e-2,
}

Edge = Literal["lowest", "highest"]


def centre(method: type[Method]) -> float:
    """The middle of a method's grid, where the user gives none."""
    usual = ADAPTER if method.traits.keeps_base else BASE
    return CENTRES.get(method.name(), usual)


def rates(middle: float, count: int) -> list[float]:
    """`count` rates, two a decade, around `middle`, to two digits: 4 around 1e-3 are 1.8e-4 .. 5.6e-3."""
    return [float(f"{middle * RATIO ** (k - (count - 1) / 2):.1e}") for k in range(count)]


def edge(rate: float, tried: Sequence[float]) -> Edge | None:
    """Whether a rate is the lowest or highest of those tried; None within, or where there is no choice."""
    if len(tried) < 2:
        return None
    if rate == min(tried):
        return "lowest"
    return "highest" if rate == max(tried) else None
