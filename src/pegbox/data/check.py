"""What is wrong with a set of examples, before a run is spent on it: each fault with its rows and what to do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pegbox.core.errors import DataError
from pegbox.data.duplicates import NearDuplicates
from pegbox.data.examples import Examples
from pegbox.data.faults import ROW_TESTS
from pegbox.data.identity import fingerprint, normalised, question, surface
from pegbox.data.report import Finding, Found, Report
from pegbox.data.supervision import Supervision, encoder

__all__ = ["Finding", "Report", "check"]

Example = Mapping[str, Any]

BATCH = 1024
COMPARED = 20_000  # rows looked at for near duplicates
FAR_LONGER = 8  # a row so many times as long as the 95th percentile is very long ...
LONG = {"tokens": 2048, "characters": 8000}  # ... if it is longer than this, too
DOMINANT = 0.9  # share of one class from which labels are unbalanced
PERCENTILES = (50, 90, 95, 99, 100)
PROMPTED = ("chat", "preference", "unpaired")  # kinds with a prompt of their own


def check(
    examples: Examples,
    tokenizer: Any = None,
    *,
    max_length: int = 2048,
    truncation: str = "right",
    assistant_only: bool = True,
    template: str | None = None,
    valid: Examples | None = None,
) -> Report:
    """Look for every fault of `pegbox.data.faults.FAULTS`; a clean set gives no finding.

    Args:
        tokenizer: with one, rows are tokenised and masked as for training; without, only their text is looked at.
        max_length, truncation, assistant_only, template: as in `pegbox.data.tokenise.encode_all`.
        valid: the validation part; what of it leaks into `examples`, and classes it alone has, are reported.

    Raises:
        DataError: there are no rows, or the tokenizer or its template cannot be trained with.
    """
    report, found, seen = Report(examples.source, examples.format.name, examples.kind), Found(), Seen()
    supervision = None
    if tokenizer is not None and examples.kind != "image":
        report.unit = "tokens"
        encode = encoder(examples.kind, tokenizer, assistant_only, template)
        supervision = Supervision(tokenizer, encode, max_length, truncation, report, found)
    lengths: dict[str, int] = supervision.lengths if supervision else {}
    for rows in _batches(examples):
        for row in rows:
            seen.look(row, found)
        if supervision:
            supervision.look(rows)
        elif examples.kind != "image":
            lengths.update((row["id"], len(surface(row))) for row in rows)
        report.rows += len(rows)
    if not report.rows:
        raise DataError(f"{report.source}: there are no rows to check")
    if supervision:
        found.details["unencodable"] = _counted(supervision.reasons)
        found.details["truncated"] = f"{report.lost_tokens} tokens lost"
    _rejected(examples, report, found)
    _lengths(lengths, report, found)
    _labels(seen.labelled, report, found)
    if valid is not None:
        _leaks(valid, seen, found)
    report.findings = found.findings()
    return report


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rows = iter(examples)
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


@dataclass
class Seen:
    """The rows that went by, as fingerprints."""

    texts: dict[str, Any] = field(default_factory=dict)  # fingerprint of the text -> its label
    questions: set[str] = field(default_factory=set)
    near: NearDuplicates = field(default_factory=NearDuplicates)
    labelled: dict[Any, list[str]] = field(default_factory=dict)  # class or tag -> ids; an id once for each

    def look(self, example: Example, found: Found) -> None:
        for name, faulty in ROW_TESTS.items():
            if faulty(example):
                found.add(name, example["id"])
        for label in _labels_of(example):
            self.labelled.setdefault(label, []).append(example["id"])
        self._repeats(example, found)
        self.questions.add(fingerprint(question(example)))

    def _repeats(self, example: Example, found: Found) -> None:
        text = surface(example)
        mark, label = fingerprint(text), example.get("label")
        if mark in self.texts:
            found.add("duplicate" if self.texts[mark] == label else "label-conflict", example["id"])
        elif len(self.near) >= COMPARED:
            found.details["near-duplicate"] = f"among the first {COMPARED} different texts"
        elif self.near.add(example["id"], text) is not None:
            found.add("near-duplicate", example["id"])
        self.texts.setdefault(mark, label)


def _rejected(examples: Examples, report: Report, found: Found) -> None:
    report.rejected = len(examples.rejected)
    found.add("rejected", *(row.id or f"{row.source}:{row.line}" for row in examples.rejected.rows))
    found.details["rejected"] = _counted(examples.rejected.reasons)


def _lengths(lengths: Mapping[str, int], report: Report, found: Found) -> None:
    ordered = sorted(lengths.values())
    if not ordered:  # images have none
        return
    report.lengths = {f"p{p}": ordered[(len(ordered) - 1) * p // 100] for p in PERCENTILES}
    bound = max(FAR_LONGER * report.lengths["p95"], LONG[report.unit])
    found.add("very-long", *(id for id, length in lengths.items() if length > bound))


def _labels_of(example: Example) -> list[Any]:
    """The classes of a row, or its tags; scores are no classes."""
    if "tags" in example:
        return list(example["tags"])
    label = example.get("label")
    labels = label if isinstance(label, list) else [label]
    return [item for item in labels if item is not None and not isinstance(item, float)]


def _labels(labelled: Mapping[Any, Sequence[str]], report: Report, found: Found) -> None:
    counts = Counter({label: len(ids) for label, ids in labelled.items()})
    report.labels = {str(label): count for label, count in counts.most_common()}
    if report.kind not in ("classification", "image"):
        return
    (most, count), *others = counts.most_common()
    if not others:
        found.add("label-single", *labelled[most])
    elif count >= DOMINANT * counts.total():
        found.add("label-imbalance", *labelled[most])
    for spellings in _spellings(counts):
        found.add("label-spelling", *(id for label in spellings[1:] for id in labelled[label]))


def _spellings(counts: Counter[Any]) -> list[list[Any]]:
    """Labels that differ in case or spacing only, the most frequent first."""
    groups: dict[str, list[Any]] = {}
    for label, _ in counts.most_common():
        groups.setdefault(normalised(str(label)), []).append(label)
    return [labels for labels in groups.values() if len(labels) > 1]


def _leaks(valid: Examples, seen: Seen, found: Found) -> None:
    for example in valid:
        text = surface(example)
        if fingerprint(text) in seen.texts:
            found.add("leak", example["id"])
        elif valid.kind in PROMPTED and fingerprint(question(example)) in seen.questions:
            found.add("prompt-leak", example["id"])
        elif seen.near.find(text) is not None:
            found.add("near-leak", example["id"])
        if any(label not in seen.labelled for label in _labels_of(example)):
            found.add("label-unseen", example["id"])


def _counted(reasons: Counter[str]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(8))
