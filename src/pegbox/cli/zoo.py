"""pegbox zoo"""

from __future__ import annotations

from typing import Annotated

import typer


def zoo(
    name: Annotated[str | None, typer.Argument(help="Show the card of this model.")] = None,
) -> None:
    """List the tiny pretrained models that ship with Pegbox, or show the card of one."""
    from pegbox import zoo as models

    if name:
        print(models.card(name).strip())
        return
    width = max(map(len, models.names()), default=0)
    for entry in map(models.entry, models.names()):
        size = f"{entry.parameters / 1e6:5.2f} M parameters, {entry.bytes / 1e6:5.2f} MB"
        on = f" on {entry.base}" if entry.base else ""
        print(f"{entry.name:<{width}}  {size}{on}  {entry.summary}")
