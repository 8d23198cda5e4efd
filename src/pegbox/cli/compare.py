"""pegbox compare"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "compare",
    "pegbox.evaluate.compare_settings:CompareSettings",
    builder="pegbox.evaluate.compare_settings:compare_settings",
    needs=("model", "data"),
)


def run(context: typer.Context) -> None:
    """Compare methods at one budget: compare model=... data=... methods=lora,miss,bitfit,full trials=4 seeds=3

    METHOD.KEY sets a method's own settings (lora.rank=16).  Finished runs are kept in output/trials.jsonl: the same
    command goes on where an interrupted one stopped.
    """
    settings = VERB.read(context)
    from pegbox.evaluate.compare import compare

    compare(settings)
