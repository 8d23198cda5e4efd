"""The texts of a source, one by one, each with the place it came from.

Tables and JSON Lines give a text a row. Plain text (`.txt`, `.md`) gives pieces of whole paragraphs, of about 8000
characters each, so that one large file is not one text; a line of its own with <|endoftext|> ends a piece as well.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.core.errors import DataError, SettingsError, did_you_mean
from pegbox.data.readers import Record, kind_of, readable
from pegbox.data.sources import HUB_ID, load_records
from pegbox.pretrain.settings import SourceSettings

PLAIN = (".txt", ".md")
PIECE = 8000  # characters from which a piece of plain text ends with its paragraph
END = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$\n?", re.MULTILINE)
HEAD = 1000  # rows looked at before a column that none of them has is an error


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a source; `key` is file:line. A row that cannot be used has a `problem`, and no text."""

    text: str
    source: str
    key: str
    problem: str | None = None


def texts(name: str, settings: SourceSettings, root: Path) -> Iterator[Text]:
    """All texts of a source, in order; a bounded part of it is in memory.

    Args:
        name: of the source, `sources.books` say, for messages.
        root: the folder that relative paths start from.

    Raises:
        SettingsError: `text` names no column.
        DataError: at once where nothing lies at a path; in the course of reading, a file that is empty or cannot be
            read or decoded, a column that `text` names and no row has.
    """
    columns = _columns(name, settings.text)
    paths = [settings.path] if isinstance(settings.path, str) else settings.path
    opened = [load_records(place(path, root)) for path in paths]  # all of them, so that a missing one is told first
    records = itertools.chain.from_iterable(map(_told, paths, opened))
    pieces = itertools.islice(_pieces(records), settings.limit)
    return _checked(name, ", ".join(paths), _filled(name, settings.text, columns, pieces))


def place(path: str, root: Path) -> str:
    """Where a path of the recipe points: into `root`, or to the hub where it reads like an id and nothing is there."""
    is_id = HUB_ID.fullmatch(path) and not path.startswith(".") and not readable(Path(path))
    return path if is_id and not (root / Path(path).parts[0]).exists() else str(root / Path(path).expanduser())


def _told(path: str, records: Iterator[Record]) -> Iterator[Record]:
    """The records of one path, what the system has against reading them told as DataError."""
    try:
        yield from records
    except (OSError, UnicodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem})") from problem


# Plain text


def _pieces(records: Iterable[Record]) -> Iterator[Record]:
    """Records, the paragraphs of plain text joined to pieces; the line of a piece is that of its first paragraph."""
    for plain, group in itertools.groupby(records, key=_plain_file):
        if plain:
            yield from _joined(group)
        else:
            yield from group


def _plain_file(found: Record) -> str | None:
    """The file, if it is plain text; `.txt` with a tag behind each word is none."""
    plain = kind_of(Path(found.source)) in PLAIN and (found.row is None or "text" in found.row)
    return found.source if plain else None


def _joined(paragraphs: Iterable[Record]) -> Iterator[Record]:
    start, end, size = 0, 0, 0
    parts: list[str] = []
    for found in paragraphs:
        if found.row is None:
            raise DataError(f"{found.source}, line {found.line}: {found.problem}; save the file as UTF-8")
        for line, text, ends in _parted(found):
            if text:
                parts += ["\n" if line == end + 1 else "\n\n", text] if parts else [text]
                start, end, size = start or line, line + text.count("\n"), size + len(text)
            if parts and (ends or size >= PIECE):
                yield Record({"text": "".join(parts)}, found.source, start)
                start, parts, size = 0, [], 0
    if parts:
        yield Record({"text": "".join(parts)}, found.source, start)


def _parted(found: Record) -> Iterator[tuple[int, str, bool]]:
    """A paragraph as (line, text, whether <|endoftext|> follows)."""
    text, at = str(found.row and found.row["text"]), 0
    for mark in END.finditer(text):
        yield found.line + text.count("\n", 0, at), text[at : mark.start()].rstrip("\n"), True
        at = mark.end()
    yield found.line + text.count("\n", 0, at), text[at:], False


# Columns


def _columns(name: str, template: str) -> list[str]:
    try:
        columns = [column for _, column, _, _ in string.Formatter().parse(template) if column is not None]
    except ValueError as problem:
        raise SettingsError(f"{name}.text {template!r}: {problem}") from problem
    if not columns or not all(columns):
        raise SettingsError(f"{name}.text {template!r} names no column; expected names in braces, '{{text}}' say")
    return columns


def _filled(name: str, template: str, columns: list[str], records: Iterable[Record]) -> Iterator[Text]:
    missing, there = dict.fromkeys(columns), set[str]()
    for count, found in enumerate(records, start=1):
        key = f"{found.source}:{found.line}"
        if found.row is None:
            yield Text("", name, key, found.problem.reason if found.problem else "no row")
            continue
        there.update(found.row)
        missing = {column: None for column in missing if column not in there}
        problem = next(filter(None, (_fault(found.row, column) for column in columns)), None)
        yield Text("" if problem else _render(template, found.row), name, key, problem)
        if missing and count >= HEAD:
            break
    if missing and there:
        column = next(iter(missing))
        raise DataError(f"{name}.text: no row has a column {column!r}{did_you_mean(column, there)}")


def _fault(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is None:
        return f"no {column}"
    return None if isinstance(value, (str, int, float)) else f"{column} is not text"


def _render(template: str, row: Mapping[str, Any]) -> str:
    return string.Formatter().vformat(template, (), row)


def _checked(name: str, where: str, found: Iterator[Text]) -> Iterator[Text]:
    """The texts, of which there must be one."""
    count, usable, first = 0, False, None
    for text in found:
        count, usable, first = count + 1, usable or text.problem is None, first or text
        yield text
    if first is None:
        raise DataError(f"{name}: {where} holds no text")
    if not usable:
        raise DataError(f"{name}: not one of {count} rows of {where} can be used; {first.key}: {first.problem}")
