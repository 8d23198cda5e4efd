"""pegbox merge"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "merge",
    "pegbox.evaluate.export:ExportSettings",
    needs=("adapter", "output"),
    subject=("adapter",),
    preset={"format": "merged"},
    hidden=("format",),
)


def run(context: typer.Context) -> None:
    """Fold an adapter into its base and prove it: merge out/ output=merged/"""
    settings = VERB.read(context)
    from pegbox.evaluate.export import export

    print(export(settings))
