"""What `pegbox data check` takes and prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pegbox.core.settings import setting


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `pegbox data check` takes as `key=value`."""

    data: str = setting("", "a file, a folder of files, or a hub id")
    model: str | None = setting(None, "whose tokenizer and chat template to use; without one only texts are looked at")
    valid: str | None = setting(None, "the held-out examples, to look for leaks between the two")
    columns: Mapping[str, str] = field(default_factory=dict, metadata={"help": "renames columns: theirs to ours"})
    limit: int | None = setting(None, "look at the first so many rows only", at_least=1)
    template: str | None = setting(None, "chat template by name, for a tokenizer that has none of its own")
    max_length: int = setting(1024, "tokens kept of an example", at_least=2)
    truncation: Literal["right", "left", "drop"] = setting("right", "which end a longer example loses")
    assistant_only: bool = setting(True, "train on assistant turns alone")
    preview: int = setting(2, "rows whose mask is shown", at_least=0)
    json: bool = setting(False, "print the report as JSON")


def print_check(settings: CheckSettings) -> bool:
    """Print the report; whether the data has no error.

    Raises:
        DataError: nothing to read, or a template that cannot be trained with.
        ModelError: the model has no tokenizer.
    """
    from pegbox.cli.console import console
    from pegbox.data.check import check
    from pegbox.data.examples import read
    from pegbox.data.preview import render

    examples = read(settings.data, columns=settings.columns, limit=settings.limit)
    tokenizer = _tokenizer(settings.model) if settings.model and examples.kind != "image" else None
    report = check(
        examples,
        tokenizer,
        max_length=settings.max_length,
        truncation=settings.truncation,
        assistant_only=settings.assistant_only,
        template=settings.template,
        valid=read(settings.valid, columns=settings.columns) if settings.valid else None,
    )
    if settings.json:
        print(report.to_json())
    else:
        screen = console()
        screen.print(render(report))
        for shown in _masks(examples, tokenizer, settings):
            screen.print(shown)
    return not report.errors


def _tokenizer(model: str) -> Any:
    from transformers import PreTrainedTokenizerBase

    from pegbox.core.errors import ModelError
    from pegbox.evaluate.opened import load_tokenizer

    found = load_tokenizer(model)
    if not isinstance(found, PreTrainedTokenizerBase):  # an image processor stands where a tokenizer would
        raise ModelError(f"there is no tokenizer at {model!r}; expected the folder or hub id of a model of texts")
    return found


def _masks(examples: Any, tokenizer: Any, settings: CheckSettings) -> Iterable[Any]:
    """The first rows with their masks, where their tokens are what is trained."""
    from itertools import islice

    from pegbox.data.preview import LEGEND, mask
    from pegbox.data.tokenise import encode_all

    if tokenizer is None or not settings.preview or examples.kind not in ("chat", "text", "tokenised"):
        return
    rows, _ = encode_all(
        islice(examples, settings.preview),
        tokenizer,
        max_length=settings.max_length,
        truncation=settings.truncation,
        assistant_only=settings.assistant_only,
        template=settings.template,
    )
    yield LEGEND
    for row in rows:
        yield f"[bold]{row.id}[/bold]"
        yield mask(row, tokenizer)
