"""The first training row as the model will see it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pegbox.data.encoded import Encoded, EncodedAnswer, EncodedLabel, EncodedPair, EncodedTarget
from pegbox.data.images import EncodedImage
from pegbox.data.packing import PackedPairs
from pegbox.data.preview import LEGEND, mask

MOST = 600  # characters shown


def show_first(row: Any, tokenizer: Any, labels: tuple[str, ...] | None) -> None:
    """Print a row: trained tokens in green, or a text with its label."""
    console = Console(highlight=False)
    if isinstance(row, PackedPairs):
        row = row.pairs[0]
    if isinstance(row, EncodedPair):
        _show_masked(console, (("chosen", row.chosen), ("rejected", row.rejected)), tokenizer)
        return
    if isinstance(row, EncodedAnswer):
        _show_masked(console, (("desirable" if row.desirable else "undesirable", row.answer),), tokenizer)
        return
    if isinstance(row, EncodedTarget):
        source, target = (tokenizer.decode(ids) for ids in (row.input_ids, row.labels))
        console.print(Text.assemble(("first row  ", "bold"), _cut(Text(source)), (" -> ", "bold"), (target, "green")))
        return
    if isinstance(row, EncodedImage):
        where = row.image if isinstance(row.image, str) else f"an image of {len(row.image)} bytes"
        named = labels[row.label] if labels is not None and isinstance(row.label, int) else row.label
        console.print(Text.assemble(("first row  ", "bold"), where, (" -> ", "bold"), (str(named), "green")))
        return
    if isinstance(row, EncodedLabel):
        text = tokenizer.decode(row.input_ids)
        named = labels[row.label] if labels is not None and isinstance(row.label, int) else row.label
        console.print(Text.assemble(("first row  ", "bold"), _cut(Text(text)), (" -> ", "bold"), (str(named), "green")))
        return
    _show_masked(console, (("", Encoded(row.input_ids, row.labels, "")),), tokenizer)


def _show_masked(console: Console, sides: tuple[tuple[str, Encoded], ...], tokenizer: Any) -> None:
    console.print(Text.assemble(("first row  ", "bold"), "(", LEGEND, ")"))
    for name, side in sides:
        if name:
            console.print(Text(name, "bold"))
        console.print(_cut(mask(side, tokenizer)))


def _cut(text: Text) -> Text:
    if len(text) > MOST:
        text.truncate(MOST)
        text.append(" ...", style="dim")
    return text
