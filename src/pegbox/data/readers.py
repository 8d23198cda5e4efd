"""Raw rows out of one file: JSON, JSON Lines, CSV, TSV, Parquet, Arrow, text and CoNLL, each also gzipped.

Every reader is a generator that holds a bounded part of the file. A broken row is a record without a row, with its
line and the reason; only a file of which no row can be told apart raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pegbox.core.errors import DataError, did_you_mean
from pegbox.data.class_names import named
from pegbox.data.rejects import RowError

Row = dict[str, Any]

CHUNK = 1 << 16  # characters read at a time from a JSON list
BATCH = 1024  # rows read at a time from Parquet and Arrow
CONTAINERS = ("instances", "data", "rows", "examples")  # keys under which a JSON object holds its list of rows
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` leaves of undecodable bytes
BETWEEN = re.compile(r"[\s,]*")
TAG = re.compile(r"O|[BIESLU]-\S+")  # IOB, IOBES and BILOU


@dataclass(frozen=True)
class Record:
    """A raw row and where it stands; or no row, the `problem`, and what stood there (`raw`)."""

    row: Row | None
    source: str
    line: int  # from 1: the line of a text file, the row of a table or list
    problem: RowError | None = None
    raw: Any = None


def record(row: Any, source: str, line: int) -> Record:
    if isinstance(row, Mapping):
        return Record(dict(row), source, line)
    return _broken(row, source, line, "not an object with columns", f"found {type(row).__name__}")


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, `.gz` taken off: `.jsonl` of `train.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def readable(path: Path) -> bool:
    return kind_of(path) in READERS


def read_file(path: Path, name: str | None = None) -> Iterator[Record]:
    """The records of one file, in order.

    Raises:
        DataError: an unknown suffix, or a file so damaged that its rows cannot be told apart.
    """
    if not readable(path):
        raise DataError(
            f"{path}: cannot read files of type {kind_of(path)!r}{did_you_mean(kind_of(path), READERS)} (each also .gz)"
        )
    try:
        yield from READERS[kind_of(path)](path, name or path.name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({problem})") from problem


def _broken(raw: Any, source: str, line: int, reason: str, detail: str = "") -> Record:
    return Record(None, source, line, RowError(reason, detail), raw)


def _bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _characters(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    with _bytes(path) as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    with (
        _bytes(path) as file,
        io.TextIOWrapper(
            file, encoding="utf-16" if utf16 else "utf-8-sig", errors="surrogateescape", newline=newline
        ) as text,
    ):
        yield text


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    with _characters(path) as file:
        yield from enumerate(file, start=1)


# JSON and JSON Lines


def _jsonl(path: Path, name: str) -> Iterator[Record]:
    return (_json_line(line, name, number) for number, line in _numbered(path) if line.strip())


def _json_line(line: str, name: str, number: int) -> Record:
    if NOT_UTF8.search(line):
        return _broken(line, name, number, "not UTF-8")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        return _broken(line, name, number, "not JSON", f"{problem.msg} at column {problem.colno}")
    except (ValueError, RecursionError) as problem:  # numbers of thousands of digits, nesting of thousands of levels
        return _broken(line, name, number, "not JSON", str(problem))
    return record(row, name, number)


def _json(path: Path, name: str) -> Iterator[Record]:
    """A list of rows, an object that holds one (LMFlow's `instances`), or JSON Lines under another name."""
    with _characters(path) as file:
        if file.read(CHUNK).lstrip().startswith("["):
            return _json_list(path, name)
    with _characters(path) as file:
        head = next((line for line in file if line.strip()), "")
        more = any(line.strip() for line in file)
    if more and _is_object(head):
        return _jsonl(path, name)
    return _json_object(path, name)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json_list(path: Path, name: str) -> Iterator[Record]:
    decoder, size, count = json.JSONDecoder(), CHUNK, 0
    with _characters(path) as file:
        buffer, at = file.read(size).lstrip(), 1  # past the opening bracket
        while True:
            at = _next_item(buffer, at)
            if buffer.startswith("]", at):
                return
            try:
                row, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as problem:
                more = file.read(size)
                if not more:
                    where = f"after {count} rows: {problem.msg}"
                    raise DataError(f"{path}: the JSON list is broken or cut short {where}") from problem
                buffer, at, size = buffer[at:] + more, 0, 2 * size
                continue
            count += 1
            if NOT_UTF8.search(buffer, at, end):
                yield _broken(buffer[at:end], name, count, "not UTF-8")
            else:
                yield record(row, name, count)
            at, size = end, CHUNK


def _next_item(buffer: str, at: int) -> int:
    between = BETWEEN.match(buffer, at)
    return between.end() if between else at


def _json_object(path: Path, name: str) -> Iterator[Record]:
    with _characters(path) as file:
        text = file.read()
    if not text.strip():
        return iter(())
    try:
        value = json.loads(text)
    except ValueError as problem:
        raise DataError(f"{path}: not JSON, and not JSON Lines: {problem}") from problem
    rows = next((value[key] for key in CONTAINERS if isinstance(value.get(key), list)), [value])
    return (record(row, name, number) for number, row in enumerate(rows, start=1))


# CSV and TSV


def _csv(path: Path, name: str) -> Iterator[Record]:
    with _characters(path, newline="") as file:
        head = file.readline()
    return _table(path, name, ";" if ";" in head and "," not in head else ",")


def _tsv(path: Path, name: str) -> Iterator[Record]:
    return _table(path, name, "\t")


def _table(path: Path, name: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the standard 128 KB is less than a long document
    with _characters(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header = [column.strip() for column in next(rows, [])]
        if len(set(header)) < len(header):
            twice = sorted({column for column in header if header.count(column) > 1})
            raise DataError(f"{path}: the header names a column twice: {twice}")
        while True:
            line = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as problem:
                yield _broken(None, name, line, "not CSV", f"{problem} (lines {line} to {rows.line_num})")
                continue
            if fields is None:
                return
            if fields:
                yield _table_row(header, fields, name, line)


def _table_row(header: list[str], fields: list[str], name: str, line: int) -> Record:
    if len(fields) != len(header):
        return _broken(
            fields, name, line, "wrong number of fields", f"{len(fields)} where the header has {len(header)}"
        )
    if any(NOT_UTF8.search(field) for field in fields):
        return _broken(fields, name, line, "not UTF-8")
    return Record(dict(zip(header, fields, strict=True)), name, line)


# Parquet and Arrow


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """Parquet and Arrow jump about in a file; a gzipped one is unpacked to a temporary file first."""
    with _bytes(path) as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            unpacked.seek(0)
            yield unpacked


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow.parquet

    with _seekable(path) as file, _damage_told(path, "Parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        yield from _batches(table.iter_batches(batch_size=BATCH), table.schema_arrow, name)


def _arrow(path: Path, name: str) -> Iterator[Record]:
    import pyarrow

    with _seekable(path) as file, _damage_told(path, "Arrow"):
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            table = pyarrow.ipc.open_stream(file)
            batches = iter(table)
        yield from _batches(batches, table.schema, name)


@contextmanager
def _damage_told(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"{path}: not {kind}, or damaged: {problem}") from problem


def _batches(batches: Iterable[Any], schema: Any, name: str) -> Iterator[Record]:
    rows: Iterator[Row] = itertools.chain.from_iterable(map(_plain, batches))
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        rows = named(rows, datasets.Features.from_arrow_schema(schema))
    return (record(row, name, number) for number, row in enumerate(rows, start=1))


def _plain(batch: Any) -> list[Row]:
    batch.validate(full=True)  # a damaged batch that is not validated can end the process
    rows: list[Row] = batch.to_pylist()
    return rows


# Text, and CoNLL in its two forms


def _text(path: Path, name: str) -> Iterator[Record]:
    """One row per paragraph; per line where no blank line stands among the first thousand; CoNLL tags recognised."""
    head = [line.strip() for _, line in itertools.islice(_numbered(path), 1000)]
    if _is_conll(head):
        return _conll(path, name)
    between = "".join("x" if line else " " for line in head).strip()
    blocks = _blocks(path) if " " in between else ((n, [line]) for n, line in _numbered(path) if line.strip())
    return (_paragraph(lines, name, number) for number, lines in blocks)


def _blocks(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    for full, group in itertools.groupby(_numbered(path), key=lambda item: bool(item[1].strip())):
        if full:
            lines = list(group)
            yield lines[0][0], [line for _, line in lines]


def _paragraph(lines: list[str], name: str, number: int) -> Record:
    text = "".join(lines).rstrip("\n")
    if NOT_UTF8.search(text):
        return _broken(text, name, number, "not UTF-8")
    return Record({"text": text}, name, number)


def _is_conll(lines: list[str]) -> bool:
    fields = [line.split() for line in lines if line and not line.startswith("-DOCSTART-")]
    return bool(fields) and all(len(f) >= 2 and TAG.fullmatch(f[-1]) for f in fields)


def _conll(path: Path, name: str) -> Iterator[Record]:
    for number, lines in _blocks(path):
        fields = [line.split() for line in lines if not line.startswith("-DOCSTART-")]
        if any(len(f) < 2 for f in fields) or NOT_UTF8.search("".join(lines)):
            yield _broken("".join(lines), name, number, "not CoNLL", "a line has no tag, or is not UTF-8")
        elif fields:
            yield Record({"tokens": [f[0] for f in fields], "tags": [f[-1] for f in fields]}, name, number)


def _conllu(path: Path, name: str) -> Iterator[Record]:
    """CoNLL-U: word forms and universal part-of-speech tags; ranges and empty nodes are left out."""
    for number, lines in _blocks(path):
        fields = [line.rstrip("\n").split("\t") for line in lines if not line.startswith("#")]
        words = [f for f in fields if f[0].isdigit()]
        if any(len(f) != 10 for f in fields) or not words or NOT_UTF8.search("".join(lines)):
            yield _broken("".join(lines), name, number, "not CoNLL-U", "a line has not ten columns, or is not UTF-8")
        else:
            yield Record({"tokens": [f[1] for f in words], "tags": [f[3] for f in words]}, name, number)


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
    ".md": _text,
    ".conll": _conll,
    ".conllu": _conllu,
}
