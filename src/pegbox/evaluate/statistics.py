"""How sure a measured number is.

A method's quality is measured with S seeds on N test rows; both could have been others, so both count:

    mean over seeds +- sqrt(h_seeds^2 + h_rows^2)
    h_seeds = t_{S-1, 0.975} s / sqrt(S)        s: standard deviation over seeds
    h_rows  = 1.96 b                            b: standard deviation of the seeds' mean over bootstrap draws of rows

The first is Student's interval of the mean over seeds, the second the bootstrap's normal interval over rows.  Adding
them counts the part of the variation that is of single rows in single seeds twice, so the interval is a little too
wide rather than too narrow.  With one seed there is no first part, and what is reported says so.

Two methods run on the same rows with the same seeds, so their difference is bootstrapped over the rows they share: it
is known better than either of the two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_975 = 1.959963984540054  # the normal distribution's 97.5 % point
DRAWS = 400  # of the bootstrap: its standard deviation is then known to about 4 %

Predictions = dict[str, Tensor]
Measure = Callable[[Predictions], float]
MeasureAll = Callable[[Predictions], dict[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        half: half the interval's width; nan where nothing tells it.
        seeds: runs that the mean is over.
        rows: test rows (or tokens) that each was measured on.
    """

    mean: float
    half: float
    seeds: int
    rows: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(runs: Sequence[Predictions], measure: Measure, *, seed: int = 0) -> Estimate:
    """The mean of a metric over runs, with its interval; see above.

    Args:
        runs: of each seed, tensors with one entry a test row, rows in the same order.
        measure: predictions to one number.
    """
    return estimate_each(runs, lambda run: {"": measure(run)}, seed=seed)[""]


def difference(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], measure: Measure, *, seed: int = 0
) -> Estimate:
    """The mean of one set of runs less that of another, measured on the same rows; of one seed each or several."""
    return difference_each(ours, theirs, lambda run: {"": measure(run)}, seed=seed)[""]


def estimate_each(runs: Sequence[Predictions], measure: MeasureAll, *, seed: int = 0) -> dict[str, Estimate]:
    """`estimate` of several metrics at once, by name."""
    values, drawn, rows = _transposed([measure(run) for run in runs]), _draws(runs, measure, seed), _rows(runs[0])
    return {n: Estimate(mean(v), _half([v], drawn[n]), len(v), rows) for n, v in values.items()}


def difference_each(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], measure: MeasureAll, *, seed: int = 0
) -> dict[str, Estimate]:
    """`difference` of several metrics at once, by name."""
    first, second = (_transposed([measure(run) for run in runs]) for runs in (ours, theirs))
    a, b = _draws(ours, measure, seed), _draws(theirs, measure, seed)
    out = {}
    for name, values in first.items():
        drawn = [x - y for x, y in zip(a[name], b[name], strict=True)]
        half = _half([values, second[name]], drawn)
        out[name] = Estimate(mean(values) - mean(second[name]), half, len(values), _rows(ours[0]))
    return out


def _half(over_seeds: Sequence[Sequence[float]], drawn: Sequence[float]) -> float:
    seeds = [student_half(values) for values in over_seeds if len(values) > 1]
    return math.hypot(*seeds, NORMAL_975 * deviation(drawn))


def _draws(runs: Sequence[Predictions], measure: MeasureAll, seed: int) -> dict[str, list[float]]:
    """The runs' means on bootstrap draws of the rows: the same draws for every call with as many rows."""
    rows, generator = _rows(runs[0]), torch.Generator().manual_seed(seed)
    out = []
    for _ in range(DRAWS):
        drawn = torch.randint(rows, (rows,), generator=generator)
        values = _transposed([measure({k: v[drawn] for k, v in run.items()}) for run in runs])
        out.append({name: mean(value) for name, value in values.items()})
    return _transposed(out)


def _transposed(measured: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [values[name] for values in measured] for name in measured[0]}


def _rows(run: Predictions) -> int:
    return len(next(iter(run.values())))


# -- means and Student's t -------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation, by n - 1; nan for one value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def student_half(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of Student's interval of a mean."""
    return student_point(len(values) - 1, 0.5 + level / 2) * deviation(values) / math.sqrt(len(values))


def student_point(freedom: int, share: float) -> float:
    """The point below which `share` (above one half) of Student's t with so many degrees of freedom lies."""
    low, high = 0.0, 1.0
    while student_share(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def student_share(t: float, freedom: int) -> float:
    """The share of Student's t below `t` >= 0 (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(2 + freedom % 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    if freedom % 2:
        return 0.5 + (angle + sine * total) / math.pi
    return 0.5 + sine * total / 2
