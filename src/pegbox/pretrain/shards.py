"""Rows of tokens on disk: files of fixed size that are mapped, not read, and whose making can be broken off anywhere.

    shards/NAME-00000.bin    (rows, length) little-endian uint16, or uint32 for vocabularies above 65,536
    shards/index.json        what they were made from; rows, tokens and cuts of each source; SHA-256 of each file

A file is written under another name, forced to disk and renamed.  After each, `NAME.progress.npz` notes how far the
source was read and what waits to be packed, so that an interrupted run goes on there and ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pegbox.core.errors import DataError, did_you_mean
from pegbox.pretrain.rows import Tokens, Waiting, best_fit, concatenate
from pegbox.pretrain.settings import Recipe, RowSettings
from pegbox.pretrain.tokenizer import encode, ends, file_hash, identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pegbox.pretrain.corpus import Corpus

FOLDER, INDEX = "shards", "index.json"
UNFINISHED, PROGRESS = ".unfinished", ".progress.npz"


@dataclass(frozen=True)
class Shard:
    """One file."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """All rows of one source."""

    rows: int
    texts: int
    tokens: int  # taken, `</s>` of each text included
    cuts: int  # times that a text was divided
    lost: int  # tokens at the end, too few to fill a row
    shards: tuple[Shard, ...]


class SourceRows:
    """The rows of one source, (n, length), mapped from its files as they are asked for; indexed by one number.

    Args:
        each: rows of a file, but for the last.
    """

    def __init__(self, paths: tuple[Path, ...], shape: tuple[int, int], dtype: str, each: int) -> None:
        self.paths, self.shape, self.dtype, self.each = paths, shape, dtype, each
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """(length,)"""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}; rows count from 0")
        file, row = divmod(index, self.each)
        if file not in self._maps:
            rows = min(self.each, len(self) - file * self.each)
            self._maps[file] = np.memmap(self.paths[file], self.dtype, "r", shape=(rows, self.shape[1]))
        return self._maps[file][row]

    def __reduce__(self) -> tuple[Any, ...]:  # a loader's worker maps anew; a pickled map is a copy of the whole file
        return SourceRows, (self.paths, self.shape, self.dtype, self.each)


@dataclass(frozen=True)
class Shards:
    """The rows of all sources.

    Attributes:
        length: T, tokens of a row.
        dtype: of a token, `<u2` or `<u4`.
        each: rows of a file, but for a source's last.
    """

    folder: Path
    length: int
    dtype: str
    each: int
    sources: Mapping[str, Packed]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each source."""
        return {name: packed.rows for name, packed in self.sources.items()}

    def rows(self, name: str) -> SourceRows:
        """Raises DataError for a name that is no source."""
        if name not in self.sources:
            raise DataError(f"no source {name!r} in {self.folder}{did_you_mean(name, self.sources)}")
        packed = self.sources[name]
        paths = tuple(self.folder / shard.file for shard in packed.shards)
        return SourceRows(paths, (packed.rows, self.length), self.dtype, self.each)


def build(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]) -> Shards:
    """The shards in `output/shards`: those that are there if made of the same texts, tokenizer and settings; else new.

    Memory holds one shard, `rows.buffer` pieces of texts and one batch of texts.

    Raises:
        DataError: a source fills no row; a file that was made is missing, empty or damaged; the disk is full, and what
            is intact then.
        SettingsError: the tokenizer has no end token.
    """
    folder = Path(recipe.output) / FOLDER
    made_from = {name: _made_from(recipe.rows, tokenizer, corpus.files[name]) for name in corpus.files}
    if _index(folder).get("made_from") == made_from:
        found = load(folder)
        say(f"shards: {_sizes(found)}, as made before")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    sources = {}
    for name in corpus.files:
        work = _Work(folder, name, made_from[name], recipe.rows, dtype, say)
        sources[name] = _pack(work, corpus.texts(name), tokenizer)
    made = Shards(folder, recipe.rows.length, dtype, recipe.rows.shard, sources)
    content = {**dataclasses.asdict(made), "made_from": made_from}
    del content["folder"]
    _write(folder / INDEX, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"), "all shards are")
    kept = {shard.file for packed in sources.values() for shard in packed.shards}
    for path in folder.iterdir():  # notes of progress, and shards of sources that are no more
        if path.name not in kept and path.name.endswith((".bin", PROGRESS, UNFINISHED)):
            path.unlink()
    say(f"shards: {_sizes(made)}")
    return made


def load(folder: Path) -> Shards:
    """Shards that have been made.

    Raises:
        DataError: they have not; a file is missing or has another size than when it was written.
    """
    index = _index(folder)
    if not index:
        raise DataError(f"{folder} has no readable {INDEX}, so no complete shards")
    sources = {name: _packed(values) for name, values in index["sources"].items()}
    for shard in (shard for packed in sources.values() for shard in packed.shards):
        fault = _fault(folder / shard.file, shard.bytes)
        if fault:
            raise DataError(f"{folder / shard.file} {fault}; delete {folder / INDEX} to have the shards made anew")
    return Shards(folder, index["length"], index["dtype"], index["each"], sources)


def _index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}


def _packed(values: Mapping[str, Any]) -> Packed:
    return Packed(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})


def _fault(path: Path, size: int) -> str | None:
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    return None if found == size else f"has {found} bytes of {size}" if found else "is empty"


def _sizes(shards: Shards) -> str:
    tokens = shards.length * sum(shards.counts.values())
    rows = ", ".join(f"{name} {rows}" for name, rows in shards.counts.items())
    return f"{tokens:,} tokens in rows of {shards.length} ({rows})"


def _made_from(settings: RowSettings, tokenizer: PreTrainedTokenizerFast, texts: Path) -> dict[str, Any]:
    plain = {key: value for key, value in dataclasses.asdict(settings).items() if key != "order"}
    return {**plain, "tokenizer": identity(tokenizer), "texts": file_hash(texts)}


# -- one source --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Where a source's shards go, and how."""

    folder: Path
    name: str
    made_from: Mapping[str, Any]
    settings: RowSettings
    dtype: str
    say: Callable[[str], None]

    @property
    def progress(self) -> Path:
        return self.folder / f"{self.name}{PROGRESS}"


@dataclass
class _Progress:
    """What of a source is on disk, and what waits."""

    shards: list[Shard] = field(default_factory=list)
    waiting: Waiting = field(default_factory=Waiting)
    done: bool = False


def _pack(work: _Work, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Packed:
    progress = _resumed(work)
    if not progress.done:
        rows = _rows(work.settings, progress.waiting, texts, tokenizer)
        while len(content := _filled(rows, work)):
            intact = f"{len(progress.shards)} files of {work.name!r} and the sources before it are"
            progress.shards.append(_write_shard(work, len(progress.shards), content, intact))
            _note(work, progress, intact)
        progress.done = True
        _note(work, progress, f"all files of {work.name!r} are")
    waiting, count = progress.waiting, sum(shard.rows for shard in progress.shards)
    if not count:
        raise DataError(
            f"source {work.name!r} fills no row: {waiting.texts} texts have {waiting.tokens} tokens, a row "
            f"{work.settings.length}; add texts to it, leave it out, or lower rows.length"
        )
    return Packed(count, waiting.texts, waiting.tokens, waiting.cuts, waiting.lost, tuple(progress.shards))


def _filled(rows: Iterator[Tokens], work: _Work) -> NDArray[np.unsignedinteger[Any]]:
    """The rows of the next file, (n, length); none at the end."""
    content = np.empty((work.settings.shard, work.settings.length), work.dtype)
    count = 0
    for count, row in enumerate(islice(rows, work.settings.shard), 1):
        content[count - 1] = row
    return content[:count]


def _write_shard(work: _Work, number: int, content: NDArray[np.unsignedinteger[Any]], intact: str) -> Shard:
    file = f"{work.name}-{number:05d}.bin"
    _write(work.folder / file, lambda handle: handle.write(content.data), intact)
    return Shard(file, len(content), content.nbytes, hashlib.sha256(content.data).hexdigest())


def _rows(
    settings: RowSettings, waiting: Waiting, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Tokens]:
    """Rows from where `waiting` is."""
    start, end = ends(tokenizer)
    unread = islice(texts, waiting.texts, None)
    encoded = ([*ids, end] for ids in encode(tokenizer, unread))
    if settings.packing == "concatenate":
        return concatenate(encoded, settings.length, start, waiting)
    return best_fit(encoded, settings.length, start, settings.buffer, waiting)


def _resumed(work: _Work) -> _Progress:
    """What an interrupted run left, if it was making the same; files that are not part of that are removed."""
    progress = _noted(work)
    known = {shard.file for shard in progress.shards}
    mine = re.compile(rf"{re.escape(work.name)}-\d{{5,}}\.bin({re.escape(UNFINISHED)})?")
    for path in work.folder.iterdir():
        if mine.fullmatch(path.name) and path.name not in known:
            path.unlink()
    if known and not progress.done:
        work.say(f"shards: {work.name} goes on after {len(known)} files")
    return progress


def _noted(work: _Work) -> _Progress:
    try:
        with np.load(work.progress) as held:
            facts, flat, sizes = json.loads(str(held["facts"])), held["flat"], held["sizes"]
    except (OSError, ValueError, KeyError):
        return _Progress()
    if facts["made_from"] != work.made_from:
        return _Progress()
    shards = [Shard(**shard) for shard in facts["shards"]]
    for shard in shards:  # written before the interruption, which may have been a crash of the machine
        path = work.folder / shard.file
        if _fault(path, shard.bytes) or file_hash(path) != shard.sha256:
            work.say(f"shards: {shard.file} is not what was written; {work.name} is made anew")
            return _Progress()
    pieces = np.split(flat, np.cumsum(sizes)[:-1]) if len(sizes) else []
    return _Progress(shards, Waiting(pieces, **facts["counts"]), facts["done"])


def _note(work: _Work, progress: _Progress, intact: str) -> None:
    waiting = progress.waiting
    counts = {name: getattr(waiting, name) for name in ("texts", "tokens", "cuts", "lost")}
    shards = [dataclasses.asdict(shard) for shard in progress.shards]
    facts = json.dumps({"made_from": work.made_from, "shards": shards, "counts": counts, "done": progress.done})
    flat = np.concatenate(waiting.pieces) if waiting.pieces else np.zeros(0, np.uint32)
    sizes = np.array([len(piece) for piece in waiting.pieces], np.int64)
    _write(work.progress, lambda file: np.savez(file, facts=facts, flat=flat, sizes=sizes), intact)


def _write(path: Path, write: Callable[[IO[bytes]], object], intact: str) -> None:
    """A file that is whole or not there.

    Raises:
        DataError: it cannot be written; `intact` says what is not touched by that.
    """
    part = path.with_name(path.name + UNFINISHED)
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; {intact} intact, and the same command goes on there"
        ) from error
