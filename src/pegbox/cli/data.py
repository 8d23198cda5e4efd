"""pegbox data"""

from __future__ import annotations

import typer

from pegbox.cli.group import OVERRIDES, Verbs
from pegbox.cli.verb import Verb

VERB = Verb("data check", "pegbox.cli.data_check:CheckSettings", needs=("data",), subject=("data",))

app = typer.Typer(cls=Verbs, help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command("check", context_settings=OVERRIDES)
def check(context: typer.Context) -> None:
    """Find what is wrong with a file of examples: data check examples.jsonl model=...

    With a model, rows are tokenised as for a run: the share of trained tokens, what is cut away, and the mask of some
    rows in colour.  Exit code 1 where a fault would spoil the run.
    """
    settings = VERB.read(context)
    from pegbox.cli.data_check import print_check

    if not print_check(settings):
        raise typer.Exit(1)
