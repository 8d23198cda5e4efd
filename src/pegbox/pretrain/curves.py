"""A run as a picture: loss with its spikes, bits per byte of held-out texts, learning rate, over steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pegbox.core.errors import MissingExtra

BITS = "eval_bits_"  # what stands before the name of a held-out source in a line of the log
Points = list[tuple[float, float]]


def require() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "pretrain", "the picture of the report")


def points(log: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of each line that has the key."""
    return [(line["step"], line[key]) for line in log if isinstance(line.get(key), (int, float))]


def bits(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Bits per byte over steps, by held-out source."""
    keys = dict.fromkeys(key for line in log for key in line if key.startswith(BITS))
    return {key.removeprefix(BITS): points(log, key) for key in keys}


def draw(log: Sequence[Mapping[str, Any]], spikes: Sequence[int], path: Path) -> None:
    """Three panels as a PNG; that of the bits is empty where nothing was held out.

    Args:
        log: lines of `metrics.jsonl`.
        spikes: steps at which the guard acted.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, held_out, rate = figure.subplots(1, 3)
    _line(loss, points(log, "loss"), "loss")
    for step in spikes:
        loss.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6)
    for name, found in bits(log).items():
        _line(held_out, found, name)
    _line(rate, points(log, "learning_rate"), "learning rate")
    for panel, title in zip(
        (loss, held_out, rate), ("loss (nats a token)", "bits per byte", "learning rate"), strict=True
    ):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    if held_out.lines:
        held_out.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _line(panel: Any, found: Points, name: str) -> None:
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    panel.plot([step for step, _ in finite], [value for _, value in finite], label=name, linewidth=1)
