"""Figures that are made once and kept in a file, and how several of them are written."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """Figures by key, in a file; several processes may add to it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def once(self, key: str, make: Callable[..., T], *args: Any) -> T:
        """What is kept under a key; made, by a call, if it is not there yet."""
        if (found := self._all().get(key)) is not None:
            return found  # type: ignore[no-any-return]
        made = make(*args)
        print(f"{key}: {made}", flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self._all() | {key: made}, indent=1) + "\n")
        return made

    def _all(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}  # type: ignore[no-any-return]


def spelled(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half a 95 % interval, by Student's t."""
    from pegbox.evaluate.statistics import student_half

    return f"{statistics.mean(values):.{digits}f} ± {student_half(values):.{digits}f}"
