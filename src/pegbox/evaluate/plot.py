"""Quality against cost, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.core.errors import MissingExtra

LOGARITHMIC = 5  # ticks of a narrower logarithmic axis run into each other


@dataclass(frozen=True)
class Point:
    """One method: a name, its quality with half an interval, and its costs by title."""

    name: str
    quality: float
    half: float
    costs: Mapping[str, float]


def plot(points: Sequence[Point], lines: Mapping[str, float], quality: str, path: Path) -> Path:
    """A panel for each cost, with the methods as points and error bars, and baselines as lines.

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
    figure = Figure(figsize=(4.0 * len(titles), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        _draw(panel, title, points, lines)
    panels[0].set_ylabel(f"{quality} (95 % interval)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _draw(panel: Any, title: str, points: Sequence[Point], lines: Mapping[str, float]) -> None:
    """One panel; its costs are logarithmic where they span more than LOGARITHMIC."""
    for number, point in enumerate(points):
        panel.errorbar(
            point.costs[title], point.quality, yerr=point.half, fmt="o", capsize=3, color=f"C{number}", label=point.name
        )
    for number, (name, value) in enumerate(lines.items()):
        panel.axhline(value, color="grey", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=name)
    costs = [point.costs[title] for point in points]
    if min(costs) > 0 and max(costs) > LOGARITHMIC * min(costs):
        panel.set_xscale("log")
    panel.margins(x=0.15)
    panel.set_xlabel(title)
    panel.grid(alpha=0.3)
