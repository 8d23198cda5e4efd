"""Quality against cost, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pegbox.core.errors import MissingExtra


@dataclass(frozen=True)
class Point:
    """One method: a name, its quality with half an interval, and its costs by title."""

    name: str
    quality: float
    half: float
    costs: Mapping[str, float]


def plot(points: Sequence[Point], lines: Mapping[str, float], quality: str, path: Path) -> Path:
    """A panel for each cost, logarithmic, with the methods as points and error bars, and baselines as lines.

    Args:
        lines: baselines by name.
        quality: what the vertical axis is.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "demo", "the plot") from error
    titles = list(points[0].costs)
    figure = Figure(figsize=(4.6 * len(titles), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        for number, point in enumerate(points):
            panel.errorbar(point.costs[title], point.quality, yerr=point.half, fmt="o", capsize=3, color=f"C{number}")
            panel.annotate(point.name, (point.costs[title], point.quality), (6, 6), textcoords="offset points")
        for name, value in lines.items():
            panel.axhline(value, color="grey", linestyle="--", linewidth=1)
            panel.annotate(
                name,
                (0.01, value),
                (0, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color="grey",
                fontsize=8,
            )
        panel.set_xscale("log")
        panel.margins(x=0.2)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{quality} (95 % interval)")
    figure.savefig(path, dpi=150)
    return path
