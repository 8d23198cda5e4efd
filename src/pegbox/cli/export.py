"""pegbox export"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb("export", "pegbox.evaluate.export:ExportSettings", needs=("adapter", "output"), subject=("adapter",))


def run(context: typer.Context) -> None:
    """Write an adapter for use elsewhere, proven equal: export out/ output=shipped/ format=peft"""
    settings = VERB.read(context)
    from pegbox.evaluate.export import export

    print(export(settings))
