"""Texts made up from a few words, and a corpus of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

WORDS = ["the", "a", "house", "river", "of", "and", "in", "stood", "ran", "slowly", "under", "bright", "old", "stone"]


def prose(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) + "." for _ in range(count)]


class TinyCorpus:
    """What the stages after the corpus read of it."""

    def __init__(self, folder: Path, texts: Mapping[str, Sequence[str]]) -> None:
        self.files = {name: folder / f"{name}.jsonl" for name in texts}
        for name, rows in texts.items():
            lines = (json.dumps({"text": text, "key": f"{name}:{i}"}) for i, text in enumerate(rows, 1))
            self.files[name].write_text("\n".join(lines) + "\n")

    def texts(self, name: str) -> Iterator[str]:
        with self.files[name].open() as lines:
            for line in lines:
                yield json.loads(line)["text"]
