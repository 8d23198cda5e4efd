"""Rows that cannot be used: never lost, always counted by reason, listed in a file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pegbox.core.errors import DataError

KEEP_IN_MEMORY = 1000  # rejected rows held for the caller; the file, where there is one, holds all


class RowError(Exception):
    """Why one row cannot be used: a `reason` shared by rows of the same fault, and this row's `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Reject:
    """One rejected row; `line` counts from 1 (line of a text file, row of a table)."""

    id: str | None
    source: str
    line: int
    reason: str
    detail: str
    row: Any

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, default=str)


@dataclass
class Rejects:
    """The rejected rows of one reading: `reasons` counts all, `rows` holds the first thousand, `path` lists all.

    Args:
        path: JSON Lines file to list them in; one left by an earlier reading is replaced.
        strict: the first rejected row raises `DataError` instead.
    """

    path: Path | None = None
    strict: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    rows: list[Reject] = field(default_factory=list)

    def __len__(self) -> int:
        return self.reasons.total()

    def restart(self) -> None:
        self.reasons.clear()
        self.rows.clear()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        if self.strict:
            raise DataError(f"{_sentence(reject)} (strict: no row may be rejected)")
        self.reasons[reject.reason] += 1
        if len(self.rows) < KEEP_IN_MEMORY:
            self.rows.append(reject)
        if self.path is not None:
            self._append(self.path, reject)

    def summary(self) -> str:
        """`3 rejected (2 not JSON, 1 label is missing)`, or nothing."""
        if not self.reasons:
            return ""
        return f"{len(self)} rejected ({', '.join(f'{n} {reason}' for reason, n in self.reasons.most_common())})"

    def first(self) -> str:
        return _sentence(self.rows[0])

    def _append(self, path: Path, reject: Reject) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # backslashreplace: bytes that were not UTF-8 are kept as the JSON escape \udcNN
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(reject.to_json() + "\n")


def _sentence(reject: Reject) -> str:
    why = f"{reject.reason}: {reject.detail}" if reject.detail else reject.reason
    return f"{reject.source}, line {reject.line}: {why}"
