"""From sources to clean texts: what is kept goes to a file for each source, what is dropped is counted and listed.

The order, for each text: cleaning (`clean.py`), repeated paragraphs, language and running text (`quality.py`), said
before word for word, nearly said before, shared with a held-out text. It is that of Wu et al., "GEB-1.3B: Open
Lightweight Large Language Model", 2024 (arXiv 2406.09900); near duplicates and held-out texts are our addition.

    output/corpus/NAME.jsonl            {"text", "key"}, key: file:line
    output/corpus/dropped/NAME.jsonl    {"key", "reason", "like": the text it repeats, "start": its first characters}
    output/corpus/held_out/NAME.jsonl   {"text", "key"}, unchanged
    output/corpus/report.json           per source: read = kept + dropped by reason, bytes
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pegbox.core.errors import DataError, SettingsError
from pegbox.core.settings import build as settings_of
from pegbox.data import duplicates, shingles
from pegbox.data.identity import fingerprint
from pegbox.pretrain import clean as cleaning
from pegbox.pretrain import contamination, quality, sources
from pegbox.pretrain.clean import clean, too_short, without_repeated_paragraphs
from pegbox.pretrain.settings import CleanSettings, DuplicateSettings, Recipe, SourceSettings
from pegbox.pretrain.sources import Text, place, texts

Say = Callable[[str], None]

START = 200  # characters listed of a dropped text


@dataclass(frozen=True)
class Corpus:
    """Clean texts on disk: a file for each source and each held-out source, and the report on them."""

    files: Mapping[str, Path]
    held_out: Mapping[str, Path]
    report: Mapping[str, Any]

    def texts(self, name: str) -> Iterator[str]:
        """The texts of a source, in order."""
        return (row["text"] for row in _rows(self.files[name]))

    def held_out_texts(self, name: str) -> Iterator[str]:
        """The texts of a held-out source, in order."""
        return (row["text"] for row in _rows(self.held_out[name]))


def build(recipe: Recipe, root: Path, say: Say) -> Corpus:
    """Clean all sources, one after the other; memory is for hashes and signatures, never for all texts.

    A source is done when its file and its entry in the report are there and were made from the same settings, files,
    rules and earlier sources; a broken-off run goes on with the first that is not. What is not a file here (a hub id,
    an entry of a registry) is taken to be the same under the same name.

    Args:
        root: the folder that relative paths start from.

    Raises:
        SettingsError: no sources, a name that cannot be a file's, an unknown language.
        DataError: as in `texts`; a source of which nothing is kept.
        MissingExtra: a language is asked for and py3langid is not installed.
    """
    folder = Path(recipe.output) / "corpus"
    held_out = [_Job(name, source, recipe.clean, root, folder / "held_out") for name, source in recipe.held_out.items()]
    sources = [_Job(name, source, recipe.clean, root, folder) for name, source in recipe.sources.items()]
    _check(sources, held_out)
    ledger, made_from = _Ledger(folder / "report.json"), _mark(_code(), asdict(recipe.duplicates))
    for job in held_out:
        made_from = job.mark(made_from)
        ledger.settle("held_out", job, made_from, _write_all, say)
    seen = _Seen(recipe.duplicates, held_out)
    for job in sources:
        made_from = job.mark(made_from)
        if not ledger.settle("sources", job, made_from, lambda job: _write_kept(job, seen), say):
            seen.done.append(job)
    report = ledger.report(sources, held_out)
    return Corpus({job.name: job.file for job in sources}, {job.name: job.file for job in held_out}, report)


@dataclass(frozen=True)
class _Job:
    """One source, and the folder that its texts are written to."""

    name: str
    source: SourceSettings
    common: CleanSettings
    root: Path
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @cached_property
    def cleaning(self) -> CleanSettings:
        """`clean` of the recipe, and of the source alone above it."""
        return settings_of(CleanSettings, {**asdict(self.common), **self.source.clean}, what=f"{self.name}.clean")

    def texts(self) -> Iterator[Text]:
        return texts(self.name, self.source, self.root)

    def mark(self, before: str) -> str:
        """What the file is made from, as a hash: settings, the contents of files, and all that came before."""
        paths = (self.source.path,) if isinstance(self.source.path, str) else self.source.path
        contents = [_sha256(path) for given in paths for path in _files(place(given, self.root))]
        return _mark(before, asdict(self.cleaning), paths, self.source.text, self.source.limit, contents)


def _check(sources: Iterable[_Job], held_out: Iterable[_Job]) -> None:
    """What is wrong with a recipe is told before anything is read."""
    if not sources:
        raise SettingsError("recipe has no sources; give sources.NAME=FILE")
    for job in (*held_out, *sources):
        if not re.fullmatch(r"\w[\w.-]*", job.name):
            raise SettingsError(f"a source cannot be called {job.name!r}: expected letters, digits, '.', '_' and '-'")
        if job.cleaning.language is not None:
            quality.check_language(job.cleaning.language)
        job.texts()


def _files(path: str) -> list[Path]:
    """The files at a path, a folder or a pattern; none for what is on the hub."""
    if glob.has_magic(path):
        return sorted(map(Path, glob.glob(path, recursive=True)))
    if Path(path).is_dir():
        return sorted(found for found in Path(path).rglob("*") if found.is_file())
    return [Path(path)] if Path(path).is_file() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code() -> list[str]:
    """The rules themselves: what other ones made is made anew."""
    rules = (sources, cleaning, quality, contamination, duplicates, shingles)
    return [_sha256(Path(module.__file__)) for module in rules if module.__file__]


def _mark(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# What becomes of a text


@dataclass
class _Seen:
    """What was kept of all sources so far, and what is held out."""

    settings: DuplicateSettings
    apart: list[_Job]
    done: list[_Job] = field(default_factory=list)  # sources kept by an earlier run, not looked at yet
    exact: set[int] = field(default_factory=set)

    @cached_property
    def near(self) -> duplicates.NearDuplicates | None:
        return None if self.settings.near is None else duplicates.NearDuplicates(self.settings.near, counted=False)

    @cached_property
    def held_out(self) -> contamination.HeldOut | None:
        """Held-out texts as cleaned ones would be, so that they are known again."""
        found = ((job, row["text"]) for job in self.apart for row in _rows(job.file))
        cleaned = (clean(text, job.cleaning).text or text for job, text in found)
        return contamination.held_out(cleaned, self.settings.held_out) if self.settings.held_out else None

    def refuse(self, key: str, text: str) -> tuple[str, str | None] | None:
        """The reason to drop a text and the one it repeats; None for a new one, which is remembered."""
        while self.done:
            job = self.done.pop(0)
            for row in _rows(job.file):
                self._remember(f"{job.name}/{row['key']}", row["text"])
        return self._remember(key, text)

    def _remember(self, key: str, text: str) -> tuple[str, str | None] | None:
        exact = int(fingerprint(text), 16) if self.settings.exact else 0
        if exact in self.exact:
            return "exact duplicate", None
        like = self.near.add(key, text) if self.near is not None else None
        if like is not None:
            return "near duplicate", like
        if self.held_out is not None and self.held_out.shares(text):
            if self.near is not None:
                self.near.forget(key)
            return "held out", None
        if self.settings.exact:
            self.exact.add(exact)
        return None


def _refined(text: Text, job: _Job, seen: _Seen) -> tuple[str, str | None, str | None]:
    """(what is kept, the reason to keep nothing, the text it repeats)"""
    if text.problem is not None:
        return "", text.problem, None
    cleaned = clean(text.text, job.cleaning)
    if cleaned.text is None:
        return "", cleaned.reason, None
    kept = without_repeated_paragraphs(cleaned.text) if seen.settings.paragraphs else cleaned.text
    reason = too_short(kept, job.cleaning) or quality.judge(kept, job.cleaning)
    if reason is not None:
        return "", reason, None
    refused = seen.refuse(f"{job.name}/{text.key}", kept)
    return ("", *refused) if refused else (kept, None, None)


# Files


def _write_kept(job: _Job, seen: _Seen) -> dict[str, Any]:
    counts = _Counts()
    with _fresh(job.file) as file, _fresh(job.folder / "dropped" / job.file.name) as dropped:
        for text in job.texts():
            kept, reason, like = _refined(text, job, seen)
            counts.add(text.text, kept, reason)
            if reason is None:
                _put(file, {"text": kept, "key": text.key})
            else:
                _put(dropped, {"key": text.key, "reason": reason, "like": like, "start": text.text[:START]})
    return counts.entry(job.name)


def _write_all(job: _Job) -> dict[str, Any]:
    """Held-out texts stay as they are, so that what is measured on them compares."""
    counts = _Counts()
    with _fresh(job.file) as file:
        for text in job.texts():
            reason = text.problem or (None if text.text.strip() else "empty")
            kept = text.text.encode("utf-8", "replace").decode()  # no file holds half a surrogate pair
            counts.add(text.text, kept, reason)
            if reason is None:
                _put(file, {"text": kept, "key": text.key})
    return counts.entry(job.name)


@dataclass
class _Counts:
    read: int = 0
    kept: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, kept: str, reason: str | None) -> None:
        self.read += 1
        self.bytes_read += _bytes(text)
        if reason is None:
            self.kept += 1
            self.bytes_kept += _bytes(kept)
        else:
            self.dropped[reason] += 1

    def entry(self, name: str) -> dict[str, Any]:
        if not self.kept:
            raise DataError(f"{name}: none of {self.read} texts is kept; {_reasons(self.dropped)}")
        return asdict(self) | {"dropped": dict(self.dropped.most_common())}


@dataclass(frozen=True)
class _Ledger:
    """report.json, written anew with each source that is done."""

    path: Path

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        empty: dict[str, dict[str, Any]] = {"sources": {}, "held_out": {}}
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else empty

    def settle(self, part: str, job: _Job, made_from: str, write: Callable[[_Job], dict[str, Any]], say: Say) -> bool:
        """See that a source is done; whether there was anything to do."""
        entry = self.entries[part].get(job.name, {})
        is_done = entry.get("made_from") == made_from and job.file.exists()
        if not is_done:
            entry = self.entries[part][job.name] = {**write(job), "made_from": made_from}
            with _fresh(self.path) as file:
                json.dump(self.entries, file, indent=1)
        say(_line(job.name, entry) + (" (done before)" if is_done else ""))
        return not is_done

    def report(self, sources: Iterable[_Job], held_out: Iterable[_Job]) -> dict[str, dict[str, Any]]:
        """The entries of this recipe."""
        parts = {"sources": sources, "held_out": held_out}
        return {part: {job.name: self.entries[part][job.name] for job in jobs} for part, jobs in parts.items()}


def _line(name: str, entry: Mapping[str, Any]) -> str:
    before, after = (entry[key] / 1e6 for key in ("bytes_read", "bytes_kept"))
    kept = f"{name}: {entry['kept']} of {entry['read']} texts kept, {after:.2f} of {before:.2f} MB"
    return f"{kept}; dropped: {_reasons(entry['dropped'])}" if entry["dropped"] else kept


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@contextmanager
def _fresh(path: Path) -> Iterator[IO[str]]:
    """A file that takes its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        yield file
    part.replace(path)


def _put(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)
