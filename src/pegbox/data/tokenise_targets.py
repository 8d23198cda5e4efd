"""Sources and targets as token ids, for encoder-decoders."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pegbox.data.encoded import EncodedTarget, Rejected, Truncation, apart, attempt, check_limits, chunks, encodings
from pegbox.data.rejects import RowError
from pegbox.data.templates import require_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Example = Mapping[str, Any]


def encode_targets_all(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, truncation: Truncation = "right"
) -> tuple[list[EncodedTarget], list[Rejected]]:
    """Chat rows as a source, all turns before the last, and a target, the assistant's last turn.

    Turns are joined by line breaks; a tokenizer with a chat template of its own writes them by that.  Both sides have
    the special tokens that the tokenizer gives a text, and the target ends in EOS.

    Args:
        max_length: tokens kept of a source, and of a target.
        truncation: which end of a source is cut, a target always loses its end; "drop" rejects long rows.

    Raises:
        DataError: a slow tokenizer.  SettingsError: `max_length` below 2, or an unknown `truncation`.
    """
    check_limits(max_length, truncation)
    require_offsets(tokenizer)
    drafts = (attempt(_Draft(e["id"], e), _split, tokenizer) for e in examples)
    rows = _with_tokens(drafts, tokenizer, truncation)
    return apart(attempt(row, _row, tokenizer, max_length, truncation) for row in rows)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on its way: its two texts, then their tokens, uncut."""

    id: str
    example: Example
    source: str = ""
    target: str = ""
    encodings: tuple[Any, Any] | None = None


def _split(row: _Draft, tokenizer: Tokenizer) -> _Draft:
    turns = list(row.example["messages"]) if "messages" in row.example else _joined(row.example)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's", f"it is {turns[-1]['role'] if turns else 'missing'}")
    source, target = _said(turns[:-1], tokenizer), str(turns[-1]["content"])
    if not target.strip():
        raise RowError("empty target", "the assistant says nothing")
    if not source.strip():
        raise RowError("empty source", "there is nothing before the answer")
    return replace(row, source=source, target=target)


def _joined(example: Example) -> list[Mapping[str, Any]]:
    return [*example["prompt"], *example["completion"]]


def _said(turns: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(str(turn["content"]) for turn in turns)
    plain: Any = [{k: v for k, v in turn.items() if k != "train"} for turn in turns]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))


def _with_tokens(
    drafts: Iterable[_Draft | Rejected], tokenizer: Tokenizer, truncation: Truncation
) -> Iterator[_Draft | Rejected]:
    for chunk in chunks(drafts):
        waiting = [row for row in chunk if isinstance(row, _Draft)]
        sources = iter(encodings(tokenizer, [row.source for row in waiting]))
        targets = iter(_target_encodings(tokenizer, [row.target for row in waiting]))
        for row in chunk:
            yield replace(row, encodings=(next(sources), next(targets))) if isinstance(row, _Draft) else row


def _target_encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
    """As `encodings`, of texts in the language of the targets, for a tokenizer that knows two."""
    return list(tokenizer(text_target=list(texts), verbose=False).encodings or ()) if texts else []


def _row(row: _Draft, tokenizer: Tokenizer, max_length: int, truncation: Truncation) -> EncodedTarget:
    assert row.encodings is not None
    source, target = row.encodings
    labels, frame, end = array("i", target.ids), list(target.special_tokens_mask), tokenizer.eos_token_id
    if end is not None and labels[-1:] != array("i", [end]):
        labels.append(end)
        frame.append(1)
    longest = max(len(source.ids), len(labels))
    if longest > max_length and truncation == "drop":
        raise RowError("too long", f"{longest} tokens of at most {max_length}")
    ids = _cut(array("i", source.ids), list(source.special_tokens_mask), max_length, truncation)
    return EncodedTarget(ids, _cut(labels, frame, max_length, "right"), row.id, longest > max_length)


def _cut(ids: array[int], special: Sequence[int], most: int, side: str) -> array[int]:
    """At most so many ids: those of the text that stand nearest the cut end go, the tokens that frame it stay."""
    over = len(ids) - most
    if over <= 0:
        return ids
    text = [at for at, mark in enumerate(special) if not mark]
    gone = set(text[-over:] if side == "right" else text[:over])
    return array("i", (i for at, i in enumerate(ids) if at not in gone))
