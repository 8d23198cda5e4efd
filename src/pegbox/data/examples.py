"""Examples in the one canonical form, out of any source; every row is either used or listed as rejected.

chat            {"id", "messages": [{"role", "content", "train"?: bool, ...}], "tools"?: [...]}
text            {"id", "text"}
classification  {"id", "text" or "messages", "text_pair"?, "label": name, number, or a list of them}
regression      the same with a float
tagging         {"id", "tokens", "tags"}
preference      {"id", "prompt", "chosen", "rejected"}, each a list of messages, "tools"?, "margin"?: float
unpaired        {"id", "prompt", "completion", "label": bool}, "tools"?
tokenised       {"id", "input_ids", "labels"?, "attention_mask"?}
image           {"id", "image": path or bytes, "label": name, number, or a list of them}

Any of them has "task" too, a name or a number, where its set has a column of that name.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pegbox.core.errors import DataError
from pegbox.data.formats import SAMPLE, Format, recognise
from pegbox.data.identity import Ids, content_id, fingerprint, question
from pegbox.data.readers import Record
from pegbox.data.rejects import Reject, Rejects, RowError
from pegbox.data.sources import Source, load_records

Example = dict[str, Any]


@dataclass
class Counts:
    """Rows read so far, and what became of them: `read == used + rejected`, always."""

    read: int = 0
    used: int = 0
    rejected: int = 0


@dataclass
class Examples:
    """Canonical examples: `rows` is a list, or, when streaming, an iterable that reads anew each time."""

    rows: Iterable[Example]
    format: Format
    counts: Counts
    rejected: Rejects
    source: str  # the file, or the first files, the rows came from

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def __len__(self) -> int:
        if not isinstance(self.rows, Sequence):
            raise TypeError("examples that stream have no length")
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not isinstance(self.rows, Sequence):
            raise TypeError("examples that stream have no order to index")
        return self.rows[index]

    @property
    def kind(self) -> str:
        """chat, text, classification, regression, tagging, preference, unpaired, tokenised or image."""
        return self.format.kind

    @property
    def announcement(self) -> str:
        """What was recognised, in one line: format, columns used and ignored, rows."""
        rows = f"{self.counts.used} rows" if isinstance(self.rows, Sequence) else "streaming"
        return "; ".join(filter(None, (f"{self.source}: {self.format.describe()}", rows, self.rejected.summary())))


def read(
    source: Source,
    *,
    split: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    format: str | None = None,
    kind: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    strict: bool = False,
    rejected_to: str | Path | None = None,
) -> Examples:
    """Read, recognise and convert.

    Args:
        source, split, columns, limit: as in `load_records`.
        format, kind: as in `recognise`: a layout by name, or a kind of data, where rows could be taken for several.
        streaming: hold a bounded number of rows; each pass over the result reads the source again. Equal rows then
            share an id, as telling them apart would take memory for every row.
        strict: the first row that cannot be used raises.
        rejected_to: the JSON Lines file in which rejected rows are listed with id, line and reason.

    Raises:
        DataError: nothing to read, no known layout, files of different layouts, or not one usable row.
    """
    rejects = Rejects(Path(rejected_to) if rejected_to else None, strict)

    def records() -> Iterator[Record]:
        return load_records(source, split=split, columns=columns, streaming=streaming, limit=limit)

    if streaming and isinstance(source, Iterator):
        raise DataError("streaming reads its source once per pass, an iterator only once; pass a list or a path")
    head = list(itertools.islice(records(), SAMPLE if streaming else None))
    if not head:
        raise DataError(f"{source if isinstance(source, (str, Path)) else 'the source'} holds no rows")
    if not streaming:
        return _read_all(head, format, kind, rejects)
    found = _recognised(head, format, kind)
    counts = Counts()
    return Examples(Stream(records, found, counts, rejects), found, counts, rejects, _origin(head))


@dataclass(frozen=True)
class Stream:
    """Examples that are read anew on every pass; counts and rejected rows are those of the latest pass."""

    records: Callable[[], Iterator[Record]]
    format: Format
    counts: Counts
    rejects: Rejects
    keep: Callable[[Example], bool] = field(default=lambda _: True)

    def __iter__(self) -> Iterator[Example]:
        self.counts.read = self.counts.used = self.counts.rejected = 0
        self.rejects.restart()
        examples = _converted(self.records(), self.format, self.counts, self.rejects, _same)
        return (example for example in examples if self.keep(example))


def split(examples: Examples, fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Two disjoint parts, the second about `fraction` of the rows.

    The side of a row follows from a hash of what it asks (case and spacing evened out) and `seed` alone: duplicates,
    and answers to the same prompt, fall on one side, and a row keeps its side when others come or go.

    Raises:
        DataError: `fraction` is not between 0 and 1, or the rows all ask the same, so that one part would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"split: fraction {fraction} is not between 0 and 1")
    if isinstance(examples.rows, Stream):
        first, second = (_streamed(examples, examples.rows, fraction, seed, side) for side in (False, True))
        return first, second
    places = {example["id"]: _place(example, seed) for example in examples}
    distinct = sorted(set(places.values()))
    if len(distinct) < 2:
        raise DataError(f"split: {len(examples)} rows that all ask the same cannot be told into two parts")
    bound = min(max(fraction, distinct[0]), distinct[-2])  # at least one row on either side
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[places[example["id"]] <= bound].append(example)
    return _part(examples, sides[0]), _part(examples, sides[1])


def _read_all(records: Sequence[Record], format: str | None, kind: str | None, rejects: Rejects) -> Examples:
    found = _recognised(records, format, kind)
    counts = Counts()
    rejects.restart()
    ids = Ids()
    rows = list(_converted(records, found, counts, rejects, ids.unique))
    if not rows:
        raise DataError(f"{_origin(records)}: not one usable row; {rejects.summary()}; the first: {rejects.first()}")
    return Examples(rows, found, counts, rejects, _origin(records))


def _same(wanted: str) -> str:
    return wanted


def _converted(
    records: Iterable[Record], format: Format, counts: Counts, rejects: Rejects, unique: Callable[[str], str]
) -> Iterator[Example]:
    for record in records:
        counts.read += 1
        try:
            example = _example(record, format)
        except RowError as problem:
            counts.rejected += 1
            rejects.add(_reject(record, problem))
            continue
        counts.used += 1
        example["id"] = unique(example["id"])
        yield example


def _example(record: Record, format: Format) -> Example:
    if record.row is None:
        raise record.problem or RowError("no row")
    own = format.id_of(record.row)
    content = format.convert(record.row)
    task = format.task_of(record.row)
    named = {} if task is None else {"task": task}
    return {"id": content_id(content) if own is None else own, **content, **named}


def _reject(record: Record, problem: RowError) -> Reject:
    row = record.raw if record.row is None else record.row
    own = record.row.get("id") if record.row else None
    return Reject(None if own is None else str(own), record.source, record.line, problem.reason, problem.detail, row)


def _recognised(records: Sequence[Record], format: str | None, kind: str | None) -> Format:
    """The format of all rows; several files must agree on it."""
    by_file: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.row is not None:
            by_file.setdefault(record.source, []).append(record.row)
    if not by_file:
        first = records[0]
        why = f"line {first.line}: {first.problem}"
        raise DataError(f"{first.source}: none of {len(records)} rows could be read; {why}")
    found = {
        name: recognise(rows[:SAMPLE], format=format, kind=kind, where=name).name for name, rows in by_file.items()
    }
    if len(set(found.values())) > 1:
        layouts = ", ".join(f"{name} ({layout})" for name, layout in found.items())
        raise DataError(f"the files have different layouts: {layouts}; read them one by one")
    rows = [row for rows in by_file.values() for row in rows]
    return recognise(rows, format=format, kind=kind, where=_origin(records))


def _origin(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(record.source for record in records))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _place(example: Example, seed: int) -> float:
    """A number in [0, 1) that follows from what the example asks, and the seed."""
    key = f"{seed}:{fingerprint(question(example))}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64


def _part(whole: Examples, rows: list[Example]) -> Examples:
    return Examples(rows, whole.format, Counts(len(rows), len(rows)), Rejects(), whole.source)


def _streamed(whole: Examples, stream: Stream, fraction: float, seed: int, second: bool) -> Examples:
    counts, rejects = Counts(), Rejects(strict=stream.rejects.strict)
    part = Stream(
        stream.records,
        stream.format,
        counts,
        rejects,
        lambda example: stream.keep(example) and (_place(example, seed) <= fraction) == second,
    )
    return Examples(part, whole.format, counts, rejects, whole.source)
