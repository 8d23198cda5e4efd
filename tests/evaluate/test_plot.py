from __future__ import annotations

from pathlib import Path

from pegbox.evaluate.plot import APART, Point, legend_columns, plot, sideways


def test_a_picture_is_written(tmp_path: Path) -> None:
    points = [
        Point("a", 0.8, 0.02, {"trained": 1e3, "seconds": 2.0}),
        Point("b", 0.9, 0.01, {"trained": 1e6, "seconds": 9.0}),
    ]
    path = plot(points, {"linear probe": 0.78}, "accuracy", tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_many_methods_of_one_cost_make_a_picture(tmp_path: Path) -> None:
    points = [Point(f"peft:method_{k}", 0.8 + k / 1000, 0.02, {"trained": 1e4, "seconds": 2.0}) for k in range(24)]
    assert plot(points, {"linear probe": 0.78}, "accuracy", tmp_path / "p.png").stat().st_size > 10_000


def test_points_of_nearly_one_cost_stand_side_by_side() -> None:
    moved = sideways([100.0, 101.0, 5000.0, 99.0], logarithmic=False)
    assert moved[2] == 0
    assert sorted(moved[k] for k in (0, 1, 3)) == [-APART, 0, APART]
    assert moved[3] < moved[0] < moved[1]  # in the order of their costs


def test_points_apart_stay_where_they_are() -> None:
    assert sideways([1.0, 10.0, 100.0], logarithmic=True) == [0, 0, 0]
    assert sideways([3.0], logarithmic=False) == [0]


def test_a_legend_is_no_wider_than_its_picture() -> None:
    assert legend_columns(["lora", "miss"], width=12) == 2
    assert legend_columns([f"peft:multitask_prompt_tuning {k}" for k in range(20)], width=12) == 3
