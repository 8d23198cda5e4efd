"""`report.md` with its picture: what a run was made of, how it went, and what came of it, each number from a file.

Compressors are the measure of a small model: xz at preset 9 and PPMd, which have read the training text first, against
the model's bits per byte on texts that none of them has seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import MissingExtra
from pegbox.evaluate.generate import generate
from pegbox.pretrain import curves
from pegbox.pretrain.bits import compressed
from pegbox.pretrain.instruct import Part
from pegbox.pretrain.settings import Recipe
from pegbox.pretrain.shards import Packed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from pegbox.pretrain.corpus import Corpus

NAME, PICTURE = "report.md", "curves.png"
LONGEST = 80  # tokens of a continuation
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
READ_FIRST = 64 << 20  # bytes of training text that compressors read; xz looks no further back


@dataclass(frozen=True)
class Sample:
    """A prompt, and how the base goes on: with the likeliest token at every step, and drawn."""

    prompt: str
    greedy: str
    drawn: str


@dataclass(frozen=True)
class Story:
    """All that a report and the cards tell.

    Attributes:
        command: that made it, as it was typed.
        made_by: versions, commit and machine, as in a manifest.
        parameters: of the model.
        texts, held_out: the corpus's own report, by source.
        packed: rows by source.
        bytes_per_token: by source.
        log: lines of `metrics.jsonl`.
        spikes: lines of `spikes.jsonl`.
        bits: bits per byte by held-out source, of all its texts.
        compressed: by held-out source, bits per byte by compressor; None where one is not installed.
        parts: of the instruction data; empty without a supervised stage.
        tokens: that training has read.
    """

    recipe: Recipe
    command: str
    made_by: Mapping[str, Any]
    parameters: int
    texts: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Mapping[str, Any]]
    packed: Mapping[str, Packed]
    bytes_per_token: Mapping[str, float]
    log: Sequence[Mapping[str, Any]]
    spikes: Sequence[Mapping[str, Any]]
    bits: Mapping[str, float]
    compressed: Mapping[str, Mapping[str, float | None]]
    tokens: int
    samples: Sequence[Sample] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def speed(self) -> float | None:
        """Tokens a second, the median over the lines of the log; None without such a line."""
        found = [value for _, value in curves.points(self.log, "tokens_per_second")]
        return statistics.median(found) if found else None


def samples(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int, seed: int
) -> list[Sample]:
    """Continuations of each prompt.

    Args:
        length: tokens that the model holds; a continuation has at most half as many.

    Raises:
        DataError: a prompt is too long for the model.
    """
    if not prompts:
        return []
    how: dict[str, Any] = {"tokenizer": tokenizer, "raw": True, "max_new_tokens": min(LONGEST, length // 2)}
    likeliest = generate(model, prompts, **how)
    drawn = generate(model, prompts, seed=seed, **how, **DRAWN)
    return [Sample(*each) for each in zip(prompts, likeliest, drawn, strict=True)]


def against_compressors(corpus: Corpus) -> dict[str, dict[str, float | None]]:
    """Bits per byte of each held-out source for xz and PPMd, which have read the last 64 MiB of the training text."""
    read = _bytes(text for name in corpus.files for text in corpus.texts(name))[-READ_FIRST:]
    found: dict[str, dict[str, float | None]] = {}
    for name in corpus.held_out:
        text = _bytes(corpus.held_out_texts(name))
        found[name] = {"xz": compressed(read, text, "xz"), "ppmd": _if_there(read, text)}
    return found


def _bytes(texts: Iterable[str]) -> bytes:
    return "\n".join(texts).encode()


def _if_there(read: bytes, text: bytes) -> float | None:
    try:
        return compressed(read, text, "ppmd")
    except MissingExtra:
        return None


def write(story: Story, folder: Path) -> Path:
    """`report.md` and `curves.png` in a folder.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    steps = [line["step"] for line in story.spikes if "step" in line]
    curves.draw(story.log, steps, folder / PICTURE)
    parts = [_head(story), f"![loss, bits per byte and learning rate over steps]({PICTURE})", bits_section(story)]
    parts += [texts_section(story), _spikes(story), _samples(story), _instruct(story), made_by_section(story)]
    path = folder / NAME
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; all columns but the first are flush right where the first row has numbers in them."""
    listed = [list(row) for row in rows]
    numeric = [bool(listed) and isinstance(cell, (int, float)) for cell in (listed[0] if listed else head)]
    lines = [_row(head), _row("---:" if number else "---" for number in numeric)]
    return "\n".join([*lines, *(_row(map(_cell, row)) for row in listed)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


# -- sections ------------------------------------------------------------------------------------------------------


def _head(story: Story) -> str:
    losses = curves.points(story.log, "loss")
    end = f" The loss ended at {losses[-1][1]:.3f} nats a token." if losses else ""
    return (
        f"# {story.recipe.name}\n\n{story.parameters:,} parameters, trained from nothing on {trained_on(story)}.{end}"
    )


def trained_on(story: Story) -> str:
    """`1,000,000 tokens, 3,000 of them a second`"""
    rate = f", {story.speed:,.0f} of them a second" if story.speed else ""
    return f"{story.tokens:,} tokens{rate}"


def bits_section(story: Story) -> str:
    """Bits per byte of held-out texts beside compressors; empty where nothing was held out."""
    if not story.bits:
        return ""
    sizes = {name: story.held_out[name]["bytes_kept"] for name in story.bits}
    columns = [story.bits, *({name: story.compressed[name][how] for name in sizes} for how in ("xz", "ppmd"))]
    rows = [(name, *(column[name] for column in columns), size) for name, size in sizes.items()]
    if len(sizes) > 1:
        rows.append(("all of them", *(overall(column, sizes) for column in columns), sum(sizes.values())))
    absent = any(row[3] is None for row in rows)
    note = " PPMd needs pyppmd, which is not installed." if absent else ""
    head = ("held out", "the model", "xz -9", "PPMd", "bytes")
    return (
        "## Bits per byte\n\nOf texts that were not trained on. Compressors have read the training text first, at most "
        f"its last {READ_FIRST >> 20} MiB.{note}\n\n{table(head, rows)}"
    )


def overall(bits: Mapping[str, float | None], sizes: Mapping[str, int]) -> float | None:
    """Bits per byte of texts together, from those of each and their bytes; None where one is not known."""
    found = [(bits[name], size) for name, size in sizes.items()]
    known = [(value, size) for value, size in found if value is not None]
    if len(known) < len(found):
        return None
    return sum(value * size for value, size in known) / sum(sizes.values())


def texts_section(story: Story) -> str:
    """Sources with their shares of training, and whose they are."""
    total = sum(source.weight for source in story.recipe.sources.values())
    rows = []
    for name, source in story.recipe.sources.items():
        found, share = story.texts[name], f"{100 * source.weight / total:.1f} %"
        sizes = (found["read"], found["kept"], found["bytes_kept"], story.packed[name].tokens)
        rows.append((name, *sizes, story.bytes_per_token[name], share, source.licence or "not given"))
    head = ("source", "texts read", "kept", "bytes", "tokens", "bytes a token", "share of rows", "licence")
    return f"## Texts\n\n{table(head, rows)}"


def _spikes(story: Story) -> str:
    if not story.recipe.guard.active:
        return "## Spikes\n\nThe guard was off."
    if not story.spikes:
        return "## Spikes\n\nNone."
    keys = list(dict.fromkeys(key for line in story.spikes for key in line))
    return f"## Spikes\n\n{table(keys, ([line.get(key) for key in keys] for line in story.spikes))}"


def _samples(story: Story) -> str:
    if not story.samples:
        return ""
    shown = [
        f"**{sample.prompt}**\n\nlikeliest:\n\n{_quoted(sample.greedy)}\n\ndrawn:\n\n{_quoted(sample.drawn)}"
        for sample in story.samples
    ]
    how = ", ".join(f"{key} {value}" for key, value in DRAWN.items())
    return "\n\n".join([f"## Continuations\n\nBy the base; drawn with {how}, seed {story.recipe.seed}.", *shown])


def _quoted(text: str) -> str:
    fence = "~~~~"
    return f"{fence}text\n{text}\n{fence}"


def _instruct(story: Story) -> str:
    if not story.parts:
        return ""
    given = story.recipe.instruct
    head = (
        "source",
        "read",
        "rejected",
        "repeated",
        "without an answer",
        "left out",
        "kept",
        "mean entropy of the kept",
    )
    rows = [
        (name, part.read, part.rejected, part.repeated, part.unscored, part.left, part.kept, part.entropy)
        for name, part in story.parts.items()
    ]
    how = {"band": f"quantiles {given.band[0]} to {given.band[1]}", "all": "all of them"}.get(
        given.select, f"the {given.select} {given.share}"
    )
    among = ", ranked within each source" if given.per_source and given.select != "all" else ""
    return (
        f"## Instructions\n\nMethod {given.method}. Chosen: {how}{among}; entropies are of the answers by the base, in "
        f"nats a token.\n\n{table(head, rows)}"
    )


def made_by_section(story: Story) -> str:
    """The command, versions and machine."""
    facts = {key: story.made_by.get(key) for key in ("pegbox", "commit", "python")}
    facts |= story.made_by.get("packages", {}) | story.made_by.get("machine", {})
    rows = [(key, str(value)) for key, value in facts.items() if value is not None]
    return f"## Made by\n\n```console\n{story.command}\n```\n\n{table(('what', 'version'), rows)}"
