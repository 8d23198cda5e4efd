"""pegbox demo"""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    sentence: Annotated[str | None, typer.Argument(help="A question to a bank, to be classified at the end.")] = None,
    output: Annotated[str, typer.Option(help="Folder for everything that is written.")] = "runs/demo",
) -> None:
    """Compare four methods on real data, merge the winner, prove it and try it: about six minutes."""
    from pegbox.recipes.demo import demo as run

    run(sentence, output)
