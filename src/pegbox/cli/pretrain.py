"""pegbox pretrain"""

from __future__ import annotations

import typer

from pegbox.cli.verb import Verb

VERB = Verb(
    "pretrain",
    "pegbox.pretrain.settings:Recipe",
    builder="pegbox.pretrain.settings:recipe",
    needs=("sources",),
)


def run(context: typer.Context) -> None:
    """Make a base from raw text: pretrain recipe.yaml train.steps=2000 output=out/

    Texts are cleaned, a tokenizer is trained, a Llama learns to continue them, and learns to answer where there is
    instruction data; output/report.md tells how it went.  Every stage that is done is kept: the same command goes on
    where an interrupted one stopped.  dry_run=true shows sizes, compute and memory, and stops.
    """
    settings = VERB.read(context)
    from pegbox.cli.overrides import folder_of
    from pegbox.pretrain.run import pretrain

    pretrain(settings, folder_of(context.args))
