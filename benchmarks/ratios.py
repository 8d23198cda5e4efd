"""From the rounds of a pair to one number with its spread, and whether that clears the bar.

A round is `{"ours": {...}, "theirs": {...}}`, two measurements made one after the other, so that what drifts in the
machine drifts for both.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Round = dict[str, dict[str, Any]]
Values = Callable[[Sequence[Round]], list[float]]


@dataclass(frozen=True)
class Bar:
    """A number that a pair is measured for, and where it should lie; without limits it is only reported.

    Attributes:
        what: the number, in words.
        values: from rounds to one value a round; empty if it could not be measured.
    """

    what: str
    values: Values
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def has_limit(self) -> bool:
        return self.at_least is not None or self.at_most is not None


@dataclass(frozen=True)
class Reading:
    """The median over rounds, the smallest and the largest; None where nothing could be measured."""

    bar: Bar
    median: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, bar: Bar, rounds: Sequence[Round]) -> Reading:
        values = bar.values(rounds)
        return cls(bar, statistics.median(values), min(values), max(values)) if values else cls(bar, None)

    @property
    def met(self) -> bool:
        """Whether the median clears the bar; what could not be measured does not."""
        if self.median is None:
            return not self.bar.has_limit
        above = self.bar.at_least is None or self.median >= self.bar.at_least
        return above and (self.bar.at_most is None or self.median <= self.bar.at_most)

    def __str__(self) -> str:
        if self.median is None:
            return "not measured"
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def value(of: str) -> Values:
    """`value("ours.import")`: one number of each round."""
    return lambda rounds: [found for found in (_pick(r, of) for r in rounds) if found is not None]


def ratio(over: str, under: str) -> Values:
    """`ratio("theirs.step", "ours.step")`: one quotient a round."""
    return lambda rounds: [_pick(r, over) / _pick(r, under) for r in rounds]


def curve_gap(key: str) -> Values:
    """Each round's mean distance between the two sides' curves, in units of the noise.

    The noise is the mean distance between two rounds of their side, which differ in the seed alone; 1 is what two runs
    of one library give.
    """

    def values(rounds: Sequence[Round]) -> list[float]:
        theirs = [r["theirs"][key] for r in rounds]
        noise = [_distance(a, b) for a, b in itertools.combinations(theirs, 2)]
        return [_distance(r["ours"][key], r["theirs"][key]) / statistics.mean(noise) for r in rounds] if noise else []

    return values


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))


def _pick(of: Round, where: str) -> Any:
    side, key = where.split(".")
    return of[side][key]
