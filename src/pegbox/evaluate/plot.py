"""Quality against cost, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.core.errors import MissingExtra

LOGARITHMIC = 5  # ticks of a narrower logarithmic axis run into each other
LETTERS, HANDLE = 11.5, 6  # of a legend: letters an inch, and what an entry takes beside its name
COLOURS, MARKERS = 10, "os^Dv"  # another marker for every ten methods
NEAR, APART = 0.03, 7.0  # costs nearer than this share of the axis are drawn this many 72nds of an inch apart


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
    width = 4.0 * len(titles)
    columns = legend_columns([*(point.name for point in points), *lines], width)
    rows = math.ceil((len(points) + len(lines)) / columns)
    figure = Figure(figsize=(width, 3.6 + 0.22 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        _draw(panel, title, points, lines)
    panels[0].set_ylabel(f"{quality} (95 % interval)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)
    return path


def legend_columns(names: Sequence[str], width: float) -> int:
    """How many names fit side by side above a picture `width` inches wide."""
    longest = max(map(len, names))
    return max(1, min(len(names), int(width * LETTERS / (longest + HANDLE))))


def sideways(costs: Sequence[float], *, logarithmic: bool) -> list[float]:
    """How far each point is drawn from its place, in 72nds of an inch: those of nearly one cost stand side by side."""
    places = [math.log(cost) if logarithmic else cost for cost in costs]
    span = max(places) - min(places) or 1.0
    order = sorted(range(len(places)), key=lambda k: places[k])
    groups: list[list[int]] = []
    for k in order:
        if groups and places[k] - places[groups[-1][-1]] < NEAR * span:
            groups[-1].append(k)
        else:
            groups.append([k])
    shift = {k: APART * (n - (len(group) - 1) / 2) for group in groups for n, k in enumerate(group)}
    return [shift[k] for k in range(len(costs))]


def _draw(panel: Any, title: str, points: Sequence[Point], lines: Mapping[str, float]) -> None:
    """One panel; its costs are logarithmic where they span more than LOGARITHMIC."""
    from matplotlib.transforms import ScaledTranslation

    costs = [point.costs[title] for point in points]
    logarithmic = min(costs) > 0 and max(costs) > LOGARITHMIC * min(costs)
    if logarithmic:
        panel.set_xscale("log")
    moved = sideways(costs, logarithmic=logarithmic)
    for number, (point, cost, aside) in enumerate(zip(points, costs, moved, strict=True)):
        shift = ScaledTranslation(aside / 72, 0, panel.figure.dpi_scale_trans)
        panel.errorbar(
            cost, point.quality, yerr=point.half, capsize=3, color=f"C{number % COLOURS}", label=point.name,
            fmt=MARKERS[number // COLOURS % len(MARKERS)], transform=panel.transData + shift,
        )  # fmt: skip
    for number, (name, value) in enumerate(lines.items()):
        panel.axhline(value, color="grey", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=name)
    panel.margins(x=0.15)
    panel.set_xlabel(title)
    panel.grid(alpha=0.3)
