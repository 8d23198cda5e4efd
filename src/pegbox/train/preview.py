"""The first training row as the model will see it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pegbox.data.encoded import Encoded, EncodedLabel
from pegbox.data.preview import LEGEND, mask

MOST = 600  # characters shown


def show_first(row: Any, tokenizer: Any, labels: tuple[str, ...] | None) -> None:
    """Print a row: trained tokens in green, or a text with its label."""
    console = Console(highlight=False)
    if isinstance(row, EncodedLabel):
        text = tokenizer.decode(row.input_ids)
        named = labels[row.label] if labels is not None and isinstance(row.label, int) else row.label
        console.print(Text.assemble(("first row  ", "bold"), _cut(Text(text)), (" -> ", "bold"), (str(named), "green")))
        return
    shown = Encoded(row.input_ids, row.labels, "")
    console.print(Text.assemble(("first row  ", "bold"), "(", LEGEND, ")"))
    console.print(_cut(mask(shown, tokenizer)))


def _cut(text: Text) -> Text:
    if len(text) > MOST:
        text.truncate(MOST)
        text.append(" ...", style="dim")
    return text
