"""The part of the demonstration that writes: shorter here than there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pegbox.recipes import plays, shipped


def rows(name: str) -> list[str]:
    with gzip.open(shipped.data(plays.DATA) / name, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_shipped_scenes_are_whole() -> None:
    assert len(set(rows("train.jsonl.gz"))) == 300
    assert "public domain" in (shipped.data(plays.DATA) / "NOTICE").read_text()


def test_it_learns_to_write_plays(tmp_path: Path) -> None:
    played = plays.play(tmp_path / "plays", max_steps=12, dtype="float32")
    assert played.before
    assert played.after
    assert played.before != played.after
