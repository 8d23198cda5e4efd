"""pegbox inspect"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "inspect",
    "pegbox.evaluate.inspect:InspectSettings",
    builder="pegbox.evaluate.inspect:inspect_settings",
    needs=(("adapter", "model"),),
    subject=("adapter", "model"),
)


def run(context: typer.Context) -> None:
    """Show a model's structure, or an adapter: inspect model | inspect out/

    With model=... method=lora: which modules the method would tune, and how many parameters that is.
    """
    settings = VERB.read(context)
    from pegbox.evaluate.inspect import inspect

    print(inspect(settings))
