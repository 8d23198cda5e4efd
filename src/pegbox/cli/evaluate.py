"""pegbox eval"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "eval",
    "pegbox.evaluate.evaluate:EvalSettings",
    needs=(("adapter", "model"), "data"),
    subject=("adapter", "model"),
)


def run(context: typer.Context) -> None:
    """Measure a model on a file of examples, before and after tuning: eval out/ data=test.jsonl"""
    settings = VERB.read(context)
    from pegbox.cli.console import console
    from pegbox.evaluate.evaluate import evaluate

    console().print(evaluate(settings))
