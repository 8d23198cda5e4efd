from __future__ import annotations

from pathlib import Path

from pegbox.evaluate.plot import Point, plot


def test_a_picture_is_written(tmp_path: Path) -> None:
    points = [
        Point("a", 0.8, 0.02, {"trained": 1e3, "seconds": 2.0}),
        Point("b", 0.9, 0.01, {"trained": 1e6, "seconds": 9.0}),
    ]
    path = plot(points, {"linear probe": 0.78}, "accuracy", tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
