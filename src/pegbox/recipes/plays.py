"""The second part of `pegbox demo`: a small language model of prose learns to write plays.

nano-llama comes with Pegbox and goes on from anything as a novel would; its lesson is 300 pieces of Shakespeare.  They
were a twentieth of what it has read, so it learns no new words here but when to use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.recipes import shipped

RECIPE, DATA, MODEL = "plays.yaml", "plays", "nano-llama"
OPENING = "The king looked at his daughter and said"
DRAWN: dict[str, Any] = {"max_new_tokens": 70, "temperature": 0.7, "top_p": 0.9, "seed": 0, "raw": True}


@dataclass(frozen=True)
class Played:
    """How the model goes on from an opening, before and after."""

    opening: str
    before: str
    after: str


def play(folder: Path, opening: str = OPENING, **settings: Any) -> Played:
    """Train, and write; an interrupted run in the folder goes on.

    Args:
        settings: in place of the recipe's.
    """
    import yaml

    from pegbox.evaluate.generate import generate
    from pegbox.train.run import train
    from pegbox.train.settings import run_settings

    recipe: dict[str, Any] = yaml.safe_load(shipped.recipes()[RECIPE].read_text())
    given = {"data": str(shipped.data(DATA) / "train.jsonl.gz"), "output": str(folder), "resume": "auto"}
    train(run_settings(recipe | given | settings))
    return Played(opening, *(generate(what, [opening], **DRAWN)[0] for what in (MODEL, folder)))
