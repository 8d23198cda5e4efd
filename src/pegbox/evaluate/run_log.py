"""Finished runs of a comparison, a line each, so that none is made twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pegbox.core.errors import SettingsError

NAME, IDENTITY = "trials.jsonl", "compare.json"
Stage = Literal["trial", "seed"]


@dataclass(frozen=True)
class Run:
    """What identifies a run."""

    method: str
    settings: str  # of the method, as JSON
    stage: Stage
    rate: float
    seed: int


@dataclass(frozen=True)
class Finished:
    """A run and what came of it.

    Attributes:
        valid: the metric on the validation rows; nan if training diverged.
        trained: parameters.
        seconds: of training alone.  per_row: of prediction, a test row, None for a trial.
        peak: bytes; None where the system does not tell.
        size: bytes of the adapter file, 0 for a trial.
    """

    run: Run
    valid: float
    trained: int
    seconds: float
    peak: int | None = None
    per_row: float | None = None
    size: int = 0
    test: dict[str, float] = field(default_factory=dict)


class RunLog:
    """The runs in an output folder.

    Args:
        identity: what all runs of a comparison share; another in the folder is an error.

    Raises:
        SettingsError: the folder holds a comparison of another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        plain = json.loads(json.dumps(identity, default=str))
        noted = folder / IDENTITY
        if noted.is_file():
            _check_same(json.loads(noted.read_text()), plain, folder)
        part = noted.with_suffix(".partial")
        part.write_text(json.dumps(plain, indent=2) + "\n")
        os.replace(part, noted)
        self.finished = {f.run: f for f in self._read()}

    def _read(self) -> list[Finished]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith("}\n")]  # the last may be cut
        if len(whole) < len(lines):
            self.path.write_text("".join(whole))
        return [_finished(json.loads(line)) for line in whole]

    def add(self, done: Finished) -> None:
        """Keep a run; it is on disk when this returns."""
        self.finished[done.run] = done
        plain = asdict(done)
        if math.isnan(done.valid):
            plain["valid"] = None  # JSON has no nan
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")


def _finished(plain: dict[str, Any]) -> Finished:
    valid = plain.pop("valid")
    return Finished(run=Run(**plain.pop("run")), valid=math.nan if valid is None else valid, **plain)


def _check_same(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    differs = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    if differs:
        key = differs[0]
        raise SettingsError(
            f"{folder} holds a comparison with {key}={there.get(key)!r}, not {here.get(key)!r}; "
            "its runs cannot be compared with these: give another output"
        )
