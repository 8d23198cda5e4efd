"""Raw rows from wherever they are: a file, a folder, a pattern, a registry entry, objects in memory, the hub."""

from __future__ import annotations

import difflib
import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pegbox.core.errors import DataError, did_you_mean
from pegbox.data import dataset_info, images
from pegbox.data.class_names import named
from pegbox.data.readers import Record, kind_of, read_file, readable, record

Source = str | Path | Iterable[Any]

HEAD = 1000  # records looked at before a renamed column that never occurs is an error
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(#(?P<rows>\d+))?")
SPLITS = {  # a split -> the words that name it in file and folder names
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
NOT_DATA = re.compile(
    r"(readme|license|notice|requirements)\b.*|dataset_info\.json|dataset_dict\.json|state\.json", re.I
)


def load_records(
    source: Source,
    *,
    split: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Iterator[Record]:
    """Raw rows with their file and line; a row that cannot be read is a record with its problem, in its place.

    Args:
        source: a path (JSON, JSONL, CSV, TSV, Parquet, Arrow, text, CoNLL; each also .gz; a folder; a pattern with
            `*`), an entry of a LLaMA-Factory registry (`folder/NAME` or `folder/dataset_info.json:NAME`), a hub id
            (`owner/name`, `owner/name:subset`, `owner/name#rows`), a `datasets` object, or a list of dicts or paths.
        split: for folders, `DatasetDict`s and hub ids; where none is named, `train` where there is one.
        columns: new names, `{"their_name": "our_name"}`; None drops a column.
        streaming: read a hub set as it comes; files are never held whole in either case.
        limit: at most so many records.

    Raises:
        DataError: nothing at `source`, an unreadable file, an unknown split, a renamed column that does not occur.
    """
    records = _records(source, split, streaming)
    if columns:
        records = _renamed(records, columns)
    return itertools.islice(records, limit)


def _records(source: Source, split: str | None, streaming: bool) -> Iterator[Record]:
    if isinstance(source, (str, Path)):
        return _located(str(source), split, streaming)
    if isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        return itertools.chain.from_iterable(_located(str(item), split, streaming) for item in source)
    if isinstance(source, Sequence):
        return (record(row, "rows", number) for number, row in enumerate(source, start=1))
    return _object(source, split)


def _object(source: Iterable[Any], split: str | None) -> Iterator[Record]:
    """A `datasets` object, or any iterable of dicts."""
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        source = source[_pick_split(split, list(source), "the DatasetDict")]
    features = source.features if isinstance(source, (datasets.Dataset, datasets.IterableDataset)) else None
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"cannot read rows from a {type(source).__name__}; expected a path, a list of dicts or a Dataset"
        )
    rows = named(source, features) if features else source
    return (record(row, "rows", number) for number, row in enumerate(rows, start=1))


def _located(source: str, split: str | None, streaming: bool) -> Iterator[Record]:
    path = Path(source).expanduser()
    registry = _registry(source)
    if registry is not None:
        return _registered(registry, split, streaming)
    if path.is_dir():
        return _folder(path, split)
    if path.exists():
        return _one_file(path, split)
    if glob.has_magic(source):
        return _files(_matching(path), split)
    hub = None if _is_local(source) else HUB_ID.fullmatch(source)
    if hub is None:
        raise DataError(f"{source!r}: no such file or folder{_nearest(path)}")
    return _hub(hub, split, streaming, path)


# Local paths


def _one_file(path: Path, split: str | None) -> Iterator[Record]:
    if split not in (None, "train"):
        raise DataError(f"{path} is one file, it has no split {split!r}; name that split's own file, or a folder")
    return _read(path, path.name)


def _read(path: Path, name: str) -> Iterator[Record]:
    """The records of one file, their images found from where it stands."""
    for found in read_file(path, name):
        if found.row is not None and any(column in found.row for column in images.COLUMNS):
            found = replace(found, row=images.located(found.row, path.parent))
        yield found


def _folder(folder: Path, split: str | None) -> Iterator[Record]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    found = [path for path in found if kind_of(path) != ".md"] or found  # beside data, Markdown is about it
    if not found and (pictures := sorted(path for path in folder.rglob("*") if images.is_image(path))):
        return _pictures(folder, pictures, split)
    if not found:
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder}: no data file in this folder; there is: {some}")
    parts = {_split_of(path.relative_to(folder)) for path in found} - {None}
    exact = [path for path in found if path.name.split(".")[0] == split]
    if exact:
        return _files(exact, None, folder)
    if not parts and split in (None, "train"):
        return _files(found, None, folder)
    chosen = _pick_split(split, sorted(str(part) for part in parts), str(folder))
    return _files([path for path in found if _split_of(path.relative_to(folder)) == chosen], None, folder)


def _files(paths: Sequence[Path], split: str | None, folder: Path | None = None) -> Iterator[Record]:
    if split is not None:
        paths = [path for path in paths if _split_of(path) == _split_name(split)]
    names = [str(path.relative_to(folder)) if folder else path.name for path in paths]
    return itertools.chain.from_iterable(_read(path, name) for path, name in zip(paths, names, strict=True))


def _pictures(folder: Path, found: Sequence[Path], split: str | None) -> Iterator[Record]:
    """Images whose folder is their class, in `CLASS/` or `SPLIT/CLASS/`."""
    parts = {_split_of(path.relative_to(folder).parent) for path in found} - {None}
    if parts or split not in (None, "train"):
        chosen = _pick_split(split, sorted(str(part) for part in parts), str(folder))
        found = [path for path in found if _split_of(path.relative_to(folder).parent) == chosen]
    loose = [path.name for path in found if path.parent == folder]
    if loose:
        raise DataError(
            f"{folder}: image {loose[0]!r} is in no class's folder; expected {folder.name}/CLASS/{loose[0]}, or a "
            "table (csv, jsonl, parquet) with the columns image and label"
        )
    rows = ({"image": str(path), "label": path.parent.name} for path in found)
    names = (str(path.relative_to(folder)) for path in found)
    return (record(row, name, 1) for row, name in zip(rows, names, strict=True))


def _matching(pattern: Path) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if readable(Path(name)))
    if not found:
        raise DataError(f"'{pattern}': the pattern matches no data file{_nearest(pattern)}")
    return found


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return readable(path) and not hidden and not NOT_DATA.fullmatch(path.name)


def _split_of(path: Path) -> str | None:
    """The split that a path below its folder names, the last word first: `val/part-0.jsonl`, `hau_train.txt`."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((name for word in reversed(words) for name, known in SPLITS.items() if word in known), None)


def _split_name(split: str) -> str:
    return next((name for name, known in SPLITS.items() if split in known), split)


def _pick_split(split: str | None, there: Sequence[str], where: str) -> str:
    wanted = "train" if split is None else split
    for name in (wanted, _split_name(wanted)):
        if name in there:
            return name
    named_like = [name for name in there if _split_name(name) == _split_name(wanted)]
    if named_like:
        return named_like[0]
    asked = "no split was named and there is no 'train'" if split is None else f"no split {split!r}"
    raise DataError(f"{where}: {asked}{did_you_mean(wanted, there)}")


def _is_local(source: str) -> bool:
    """Whether a name that does not exist was meant as a path, not as a hub id."""
    return readable(Path(source)) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() or readable(entry)}
    wanted = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    return f"; nearest in {folder}: {', '.join(near)}" if near else f"; nothing in {folder} has a name like it"


# Registries and the hub


def _registry(source: str) -> tuple[Path, str | None] | None:
    """`folder/dataset_info.json`, the same with `:NAME`, a folder that holds one, or `folder/NAME` beside one."""
    place, _, name = source.partition(f"{dataset_info.NAME}:")
    if name:
        return Path(place).expanduser() / dataset_info.NAME, name
    path = Path(source).expanduser()
    if path.name == dataset_info.NAME and path.exists():
        return path, None
    if path.is_dir() and dataset_info.entries(path / dataset_info.NAME):
        return path / dataset_info.NAME, None
    beside = path.parent / dataset_info.NAME
    if not path.exists() and path.name in dataset_info.entries(beside):
        return beside, path.name
    return None


def _registered(registry: tuple[Path, str | None], split: str | None, streaming: bool) -> Iterator[Record]:
    entry = dataset_info.entry(*registry)
    records = _records(entry.source, split or entry.split, streaming)
    rewritten = (
        found if found.row is None else Record(entry.rewrite(found.row), found.source, found.line) for found in records
    )
    return itertools.islice(rewritten, entry.limit)


def _hub(hub: re.Match[str], split: str | None, streaming: bool, path: Path) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(hub["id"], hub["subset"], split=split, streaming=streaming)
    except (OSError, ValueError) as problem:  # not found, offline, no such subset or split
        raise DataError(
            f"{hub[0]!r}: no file or folder of this name here{_nearest(path)}; and as a hub id it could not be loaded "
            f"({type(problem).__name__}: {problem})"
        ) from problem
    rows = int(hub["rows"]) if hub["rows"] else None
    return itertools.islice(_object(loaded, None), rows)


# Renaming


def _renamed(records: Iterator[Record], columns: Mapping[str, str | None]) -> Iterator[Record]:
    head = list(itertools.islice(records, HEAD))
    there = {column for found in head if found.row is not None for column in found.row}
    for column in columns:
        if there and column not in there:
            raise DataError(f"columns: no column {column!r} to rename{did_you_mean(column, there)}")
    return (_rename(found, columns) for found in itertools.chain(head, records))


def _rename(found: Record, columns: Mapping[str, str | None]) -> Record:
    if found.row is None:
        return found
    given = {new for old, new in columns.items() if new and old in found.row}
    kept = {column: value for column, value in found.row.items() if column not in columns and column not in given}
    new = {name: found.row[old] for old, name in columns.items() if name and old in found.row}
    return Record(kept | new, found.source, found.line)
