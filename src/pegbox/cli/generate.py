"""pegbox generate"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "generate",
    "pegbox.evaluate.generate:GenerateSettings",
    needs=(("adapter", "model"), ("prompt", "data")),
    subject=("adapter", "model"),
)


def run(context: typer.Context) -> None:
    """Answer a prompt, or a file of them: generate out/ prompt="..."

    With data=in.jsonl output=out.jsonl every row of a file is answered; adapters=a=FOLDER,b=FOLDER puts several
    adapters on one base, and a row's column `adapter` chooses.
    """
    settings = VERB.read(context)
    from pegbox.evaluate import generate

    print(generate.run(settings))
