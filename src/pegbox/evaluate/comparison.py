"""What a comparison found: a table for the terminal, the same as Markdown, JSON, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from pegbox.core.errors import MissingExtra
from pegbox.evaluate import grid
from pegbox.evaluate.plot import Point, plot
from pegbox.evaluate.run_log import Finished
from pegbox.evaluate.statistics import Estimate, Predictions, difference, estimate, mean

if TYPE_CHECKING:
    from pegbox.evaluate.bench import Bench

TABLE, RESULTS, PLOT = "table.md", "results.json", "quality_against_cost.png"
PROBE = "linear probe"


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        quality: on the test rows; over_probe: less the linear probe's, where there is one.
        rate: the best learning rate; edge: whether it was the lowest or highest tried.
        tried: validation metric by rate.
        trained, size, peak, seconds, per_row: parameters, adapter bytes, memory bytes, seconds of training and of
            predicting a row; medians or, for memory, the largest over seeds.  None for baselines.
    """

    name: str
    quality: Estimate
    over_probe: Estimate | None = None
    rate: float | None = None
    edge: grid.Edge | None = None
    tried: Mapping[str, float] | None = None
    trained: int | None = None
    size: int | None = None
    peak: int | None = None
    seconds: float | None = None
    per_row: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All entries, the methods first and the baselines after them.

    Attributes:
        metric: that decides.
        budget: what every method got, in words.
        winner: by the validation rows.
        over_next: by how much the winner is better than each other method on the test rows.
    """

    metric: str
    higher_is_better: bool
    budget: Sequence[str]
    entries: Sequence[Entry]
    winner: str
    over_others: Mapping[str, Estimate]
    cores: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(*self.header, title=f"{self.metric} on {self.entries[0].quality.rows} test rows", box=SIMPLE)
        for column in table.columns[1:]:
            column.justify = "right"
        for entry in self.entries:
            table.add_row(*self.cells(entry), style="bold" if entry.name == self.winner else None)
        yield table
        yield from self.notes

    # -- the table -------------------------------------------------------------------------------------------------

    @property
    def has_probe(self) -> bool:
        return any(e.name == PROBE for e in self.entries)

    @property
    def header(self) -> list[str]:
        probe = ["less probe"] if self.has_probe else []
        return ["method", self.metric, *probe, "rate", "trained", "adapter", "peak memory", "training", "a row"]

    def cells(self, entry: Entry) -> list[str]:
        """The entry as text, in the order of `header`."""
        probe = [self.spell(entry.over_probe, signed=True)] if self.has_probe else []
        rate = "-" if entry.rate is None else f"{entry.rate:.2g}" + ("*" if entry.edge else "")
        trained = "-" if entry.trained is None else f"{entry.trained:,}"
        return [
            entry.name,
            self.spell(entry.quality),
            *probe,
            rate,
            trained,
            _megabytes(entry.size),
            _megabytes(entry.peak),
            "-" if entry.seconds is None else f"{entry.seconds:.1f} s",
            "-" if entry.per_row is None else f"{1000 * entry.per_row:.2f} ms",
        ]

    def spell(self, value: Estimate | None, *, signed: bool = False) -> str:
        """`88.7 % ± 1.4`, or plain numbers where the metric is no share."""
        if value is None:
            return "-"
        if self.is_share:
            mark = "" if signed else " %"
            return f"{100 * value.mean:{'+' if signed else ''}.1f}{mark} ± {100 * value.half:.1f}"
        return f"{value.mean:{'+' if signed else ''}.4g} ± {value.half:.2g}"

    @property
    def is_share(self) -> bool:
        return self.metric in ("accuracy", "macro_f1")

    # -- what it means ---------------------------------------------------------------------------------------------

    @property
    def notes(self) -> list[str]:
        """What a reader must know to trust the table, a sentence each."""
        seeds = self.entries[0].quality.seeds
        spread = f"{seeds} seeds and the test rows" if seeds > 1 else "the test rows alone, for there was one seed"
        out = [
            *self.budget,
            f"± is half a 95 % interval over {spread} (see pegbox.evaluate.statistics); 'less probe' is on the same "
            "rows; memory is the whole process's, times are medians over seeds, a row's that of batches; "
            f"{self.cores} cores",
            f"winner by the validation rows: {self.winner}; " + self._against(),
        ]
        out += [self._edge(e) for e in self.entries if e.edge]
        return out + ([self._probe()] if self.has_probe else [])

    def _against(self) -> str:
        told = [f"{name} ({self.spell(d, signed=True)})" for name, d in self.over_others.items()]
        if not told:
            return "there was no other"
        ahead = [n for n, d in self.over_others.items() if (d.low if self.higher_is_better else -d.high) > 0]
        sure = f"surely ahead of {', '.join(ahead)}" if ahead else "surely ahead of none of the others"
        return f"on the test rows {sure}; its lead over " + ", ".join(told)

    @staticmethod
    def _edge(entry: Entry) -> str:
        return (
            f"* {entry.name}: the {entry.edge} rate tried was the best, so a better one may lie beyond; "
            f"rates.{entry.name}={entry.rate:.2g} centres the grid there"
        )

    def _probe(self) -> str:
        """How the methods stand to the linear probe, nothing hidden."""
        over = {e.name: e.over_probe for e in self.entries if e.over_probe is not None}
        groups = {
            "surely ahead": [n for n, d in over.items() if d.low > 0],
            "surely behind": [n for n, d in over.items() if d.high < 0],
            "not told apart": [n for n, d in over.items() if d.low <= 0 <= d.high],
        }
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
        end = "" if groups["surely ahead"] else "; within this budget the probe is as good, and it is cheaper"
        return f"against the linear probe on the frozen model: {told}{end}"

    # -- files -----------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """The table and its notes."""
        lines = ["| " + " | ".join(self.header) + " |", "| --- |" + " ---: |" * (len(self.header) - 1)]
        for entry in self.entries:
            cells = self.cells(entry)
            if entry.name == self.winner:
                cells[0] = f"**{cells[0]}**"
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": self.notes}

    def save(self, folder: Path) -> None:
        """Table, numbers and, where matplotlib is installed, the picture."""
        (folder / TABLE).write_text(self.markdown())
        (folder / RESULTS).write_text(json.dumps(_plain(self.to_dict()), indent=2) + "\n")
        try:
            plot(self._points(), self._lines(), self.metric, folder / PLOT)
        except MissingExtra:
            return

    def _points(self) -> list[Point]:
        costs = {"trained parameters": "trained", "seconds of training": "seconds", "peak memory (MB)": "peak"}
        methods = [e for e in self.entries if e.trained is not None]
        known = {title: key for title, key in costs.items() if all(getattr(e, key) for e in methods)}
        scale = {"peak": 1e-6}
        return [
            Point(
                e.name, e.quality.mean, e.quality.half, {t: getattr(e, k) * scale.get(k, 1) for t, k in known.items()}
            )
            for e in methods
        ]

    def _lines(self) -> dict[str, float]:
        """Baselines near enough to the methods to be drawn beside them."""
        methods = [e.quality.mean for e in self.entries if e.trained is not None]
        reach = max(0.1, 3 * (max(methods) - min(methods)))
        return {
            e.name: e.quality.mean
            for e in self.entries
            if e.trained is None and abs(e.quality.mean - max(methods)) <= reach
        }


def conclude(
    bench: Bench,
    budget: Sequence[str],
    trials: Mapping[str, Sequence[Finished]],
    seeds: Mapping[str, Sequence[Finished]],
    predictions: Mapping[str, Sequence[Predictions]],
    baselines: Mapping[str, Predictions],
    winner: str,
) -> Comparison:
    """Put the numbers together."""
    import torch

    probe = [baselines[PROBE]] if PROBE in baselines else None
    measure = bench.measure
    entries = [
        Entry(
            name,
            estimate(predictions[name], measure),
            over_probe=difference(predictions[name], probe, measure) if probe else None,
            rate=runs[0].run.rate,
            edge=grid.edge(runs[0].run.rate, [t.run.rate for t in trials[name]]),
            tried={f"{t.run.rate:.2g}": t.valid for t in trials[name]},
            trained=runs[0].trained,
            size=round(mean([r.size for r in runs])),
            peak=max((r.peak for r in runs if r.peak), default=None),
            seconds=median(r.seconds for r in runs),
            per_row=median(r.per_row or 0.0 for r in runs),
        )
        for name, runs in seeds.items()
    ]
    entries += [Entry(name, estimate([made], measure)) for name, made in baselines.items()]
    over = {n: difference(predictions[winner], predictions[n], measure) for n in seeds if n != winner}
    objective = bench.objective
    return Comparison(
        objective.best, objective.higher_is_better, budget, entries, winner, over, torch.get_num_threads()
    )


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _plain(value: Any) -> Any:
    """For JSON, which has no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
