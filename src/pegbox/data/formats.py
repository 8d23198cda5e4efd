"""Which published layout a set of rows has, told from its columns and values, without registration."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pegbox.core.errors import DataError, did_you_mean
from pegbox.data.conversations import text
from pegbox.data.layouts import LAYOUTS, Convert, Example, Layout, Row
from pegbox.data.rejects import RowError

SAMPLE = 1000  # rows looked at


@dataclass(frozen=True)
class Format:
    """A layout bound to the columns of one set."""

    layout: Layout
    kind: str  # the layout's kind; `regression` where the labels of a classification are scores
    columns: dict[str, str]  # what a value is -> its column
    ignored: tuple[str, ...]
    reader: Convert
    has_id: bool = False
    has_task: bool = False

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def used(self) -> tuple[str, ...]:
        own = [word for word, has in (("id", self.has_id), ("task", self.has_task)) if has]
        return (*own, *self.columns.values())

    def convert(self, row: Row) -> Example:
        """The canonical example of a row, without its id.

        Raises:
            RowError: a value is missing, of another type, or contradicts another.
        """
        for name in self.layout.needs:
            if row.get(self.columns[name]) is None:
                raise RowError(f"{self.columns[name]} is missing")
        return self.reader({name: row.get(column) for name, column in self.columns.items()})

    def id_of(self, row: Row) -> str | None:
        """The row's own id, where its set has them."""
        value = row.get("id") if self.has_id else None
        return None if value is None or value == "" else text(value, "id")

    def task_of(self, row: Row) -> str | int | None:
        """The task that a row is of, a name or a number, where its set says so."""
        return row.get("task") if self.has_task else None

    def describe(self) -> str:
        """`alpaca: columns instruction, output used; category ignored`."""
        kind = " (scores)" if self.kind == "regression" else ""
        ignored = f"; {', '.join(self.ignored)} ignored" if self.ignored else ""
        return f"{self.name}{kind}: columns {', '.join(self.used)} used{ignored}"


def recognise(
    rows: Iterable[Row], *, format: str | None = None, kind: str | None = None, where: str = "the rows"
) -> Format:
    """The first layout of `LAYOUTS` that the rows fit.

    Args:
        rows: a sample, or all rows; the type of a label is read off all that are given.
        format: the name of a layout, where the choice must not be left to the rows.
        kind: take only layouts of this kind (`chat`, `text`, `classification`, `tagging`, `preference`, ...).
        where: what to call the set in an error.

    Raises:
        DataError: no layout fits (with the columns found, the nearest layout and what it misses), or no such name.
    """
    rows = list(rows)
    sample = rows[:SAMPLE]
    often, ever = _columns(sample)
    candidates = _candidates(format, kind)
    for layout in candidates:
        if layout.matches(often, sample) or (format and not layout.misses(ever)):
            return _bound(layout, often, ever, rows)
    raise DataError(_unrecognised(candidates, often, ever, sample, where))


def _bound(layout: Layout, often: Sequence[str], ever: Sequence[str], rows: Sequence[Row]) -> Format:
    needed = {name: column for name, column in layout.bind(often).items() if name in layout.needs}
    bound = layout.bind(ever) | needed
    columns = dict(sorted(bound.items(), key=lambda item: ever.index(item[1])))
    has_id = "id" in ever and "id" not in columns.values()
    has_task = "task" in ever and "task" not in columns.values() and all(_names_task(row.get("task")) for row in rows)
    own = [word for word, has in (("id", has_id), ("task", has_task)) if has]
    ignored = tuple(column for column in ever if column not in columns.values() and column not in own)
    kind, reader = layout.kind, layout.convert
    if layout.learn is not None:
        kind, reader = layout.learn({name: row.get(column) for name, column in columns.items()} for row in rows)
    return Format(layout, kind, columns, ignored, reader, has_id, has_task)


def _names_task(value: Any) -> bool:
    return value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))


def _columns(sample: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Columns that hold something in most rows, and in any."""
    filled = Counter(column for row in sample for column, value in row.items() if value is not None)
    return [column for column, count in filled.items() if 2 * count > len(sample)], list(filled)


def _candidates(format: str | None, kind: str | None) -> list[Layout]:
    names, kinds = {layout.name for layout in LAYOUTS}, {layout.kind for layout in LAYOUTS}
    if format is not None and format not in names:
        raise DataError(f"unknown format {format!r}{did_you_mean(format, names, most=30)}")
    if kind is not None and kind not in kinds | {"regression"}:
        raise DataError(f"unknown kind of data {kind!r}{did_you_mean(kind, kinds)}")
    kind = "classification" if kind == "regression" else kind
    return [layout for layout in LAYOUTS if format in (None, layout.name) and kind in (None, layout.kind)]


def _unrecognised(
    candidates: Sequence[Layout], often: Sequence[str], ever: Sequence[str], sample: Sequence[Row], where: str
) -> str:
    found = f"{where}: {_listed(ever)} fit no known layout"
    nearest = max(reversed(candidates), key=lambda layout: _nearness(layout, often))
    missing = nearest.misses(often)
    if not any(_nearness(nearest, often)):
        usual = {layout.kind: " + ".join(layout.misses([])) for layout in candidates}
        known = "; ".join(f"{columns} ({kind})" for kind, columns in usual.items())
        return f"{found}; there are {known}. Rename with columns={{'THEIRS': 'OURS'}}"
    if not missing:
        types = {column: type(_first(sample, column)).__name__ for column in nearest.bind(often).values()}
        seen = ", ".join(f"{column} {kind}" for column, kind in types.items())
        return f"{found}; nearest is {nearest.name}, a row of which is {nearest.shape}; found {seen}"
    spelled = {near: name for name in missing if (near := _nearly(name, ever))}
    source, target = next(iter(spelled.items()), ("YOUR_COLUMN", missing[0]))
    misses = f"which misses {', '.join(map(repr, missing))}"
    return f"{found}; nearest is {nearest.name}, {misses}. Rename with columns={{{source!r}: {target!r}}}"


def _listed(columns: Sequence[str], most: int = 12) -> str:
    more = f" and {len(columns) - most} more" if len(columns) > most else ""
    return f"columns {', '.join(map(repr, columns[:most])) or '(none)'}{more}"


def _nearness(layout: Layout, columns: Sequence[str]) -> tuple[float, int]:
    """Share of the needed columns that are there (a near spelling is half), and how many by the usual name."""
    missing = layout.misses(columns)
    near = sum(_nearly(name, columns) is not None for name in missing)
    usual = sum(known[0] in columns for known in layout.needs.values())
    return (len(layout.needs) - len(missing) + 0.5 * near) / len(layout.needs), usual


def _nearly(name: str, columns: Sequence[str]) -> str | None:
    """The column that is `name` but for case or a slip of the pen."""
    lower = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name, lower, n=1, cutoff=0.8)
    return lower[near[0]] if near else None


def _first(sample: Sequence[Row], column: str) -> Any:
    return next((row[column] for row in sample if row.get(column) is not None), None)
