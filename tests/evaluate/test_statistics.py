from __future__ import annotations

import math

import pytest
import torch

from pegbox.evaluate.statistics import (
    deviation,
    difference,
    difference_each,
    estimate,
    student_half,
    student_point,
    student_share,
)

# Abramowitz and Stegun (1964), table 26.10
TABLE = [
    (1, 0.975, 12.706),
    (2, 0.975, 4.303),
    (3, 0.975, 3.182),
    (10, 0.975, 2.228),
    (7, 0.95, 1.895),
    (120, 0.995, 2.617),
]


def right(run: dict[str, torch.Tensor]) -> float:
    return float(run["right"].mean())


def run(share: float, rows: int = 400, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows that are right with probability `share`; the same seed is right on the same rows as far as it goes."""
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"right": (drawn < share).double()}


@pytest.mark.parametrize(("freedom", "share", "point"), TABLE)
def test_students_points(freedom: int, share: float, point: float) -> None:
    assert student_point(freedom, share) == pytest.approx(point, abs=6e-4)
    assert student_share(student_point(freedom, share), freedom) == pytest.approx(share, abs=1e-12)


def test_students_interval_of_three() -> None:
    assert student_half([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert math.isnan(deviation([1.0]))


def test_one_run_has_the_binomial_interval() -> None:
    found = estimate([run(0.8)], right)
    expected = 1.96 * math.sqrt(found.mean * (1 - found.mean) / 400)
    assert found.half == pytest.approx(expected, rel=0.12)  # 400 draws tell a deviation to about 4 %
    assert (found.seeds, found.rows) == (1, 400)


def test_seeds_widen_the_interval() -> None:
    same = estimate([run(0.8)] * 3, right)
    runs = [run(0.7), run(0.8), run(0.9)]
    spread = estimate(runs, right)
    assert spread.half > 2 * same.half
    assert spread.half == pytest.approx(
        math.hypot(student_half([right(run(s)) for s in (0.7, 0.8, 0.9)]), same.half), rel=0.1
    )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = [abs(estimate([run(0.8, 200, seed)], right, seed=seed).mean - 0.8) for seed in range(60)]
    inside = sum(d <= estimate([run(0.8, 200, seed)], right, seed=seed).half for seed, d in enumerate(held))
    assert inside >= 52  # 57 expected, standard deviation 1.7


def test_a_difference_on_the_same_rows_is_sharper() -> None:
    ours, theirs = run(0.82), run(0.80)
    paired = difference([ours], [theirs], right)
    assert paired.mean == pytest.approx(right(ours) - right(theirs))
    assert paired.half < 0.5 * math.hypot(estimate([ours], right).half, estimate([theirs], right).half)
    assert difference([ours], [ours], right).half == 0.0


def test_several_metrics_at_once() -> None:
    both = difference_each([run(0.9)], [run(0.5)], lambda r: {"right": right(r), "wrong": 1 - right(r)})
    assert both["right"].mean == pytest.approx(-both["wrong"].mean)
    assert both["right"].low > 0 > both["wrong"].high
