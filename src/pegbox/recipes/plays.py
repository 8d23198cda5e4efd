"""The second part of `pegbox demo`: a small language model of prose learns to write plays.

nano-llama comes with Pegbox and has read books; its lesson is 300 pieces of Shakespeare, and 40 others tell what it has
learned.
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
    """How the model went on from an opening, and its perplexity on plays that it had not seen, before and after."""

    opening: str
    texts: tuple[str, str]
    perplexity: tuple[float, float]


def play(folder: Path, opening: str = OPENING, **settings: Any) -> Played:
    """Train, measure, write; an interrupted run in the folder goes on.

    Args:
        settings: in place of the recipe's.
    """
    import yaml

    from pegbox.evaluate.evaluate import EvalSettings, evaluate
    from pegbox.evaluate.generate import generate
    from pegbox.train.run import train
    from pegbox.train.settings import run_settings

    recipe: dict[str, Any] = yaml.safe_load(shipped.recipes()[RECIPE].read_text())
    data = shipped.data(DATA)
    given = {"data": str(data / "train.jsonl.gz"), "output": str(folder), "resume": "auto"}
    train(run_settings(recipe | given | settings))
    found = evaluate(EvalSettings(adapter=str(folder), data=str(data / "valid.jsonl.gz"), max_length=256))
    before, after = (generate(what, [opening], **DRAWN)[0] for what in (MODEL, folder))
    return Played(opening, (before, after), (found.before["perplexity"].mean, found.after["perplexity"].mean))
