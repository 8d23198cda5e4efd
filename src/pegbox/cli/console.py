"""Where tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 120  # columns of a file or a pipe, which has no width of its own


def console() -> Console:
    """A console as wide as the terminal, or WIDE where there is none."""
    from rich.console import Console

    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDE)
