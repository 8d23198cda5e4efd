"""Labelled texts and tagged words as token ids, for classification, regression and token classification."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import did_you_mean
from pegbox.data.encoded import (
    IGNORE,
    Encoded,
    EncodedLabel,
    Label,
    Rejected,
    apart,
    attempt,
    check_limits,
    chunks,
    doubled,
    encodings,
)
from pegbox.data.rejects import RowError
from pegbox.data.templates import require_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Example = Mapping[str, Any]


def encode_classification(
    example: Example, tokenizer: Tokenizer, labels: Sequence[str] | None, *, max_length: int
) -> EncodedLabel | Rejected:
    """One row of `encode_classification_all`."""
    used, rejected = encode_classification_all([example], tokenizer, labels, max_length=max_length)
    return used[0] if used else rejected[0]


def encode_classification_all(
    examples: Iterable[Example], tokenizer: Tokenizer, labels: Sequence[str] | None, *, max_length: int
) -> tuple[list[EncodedLabel], list[Rejected]]:
    """Texts, or pairs of texts, with their labels; of a pair too long, the longer text is cut.

    Args:
        labels: the class names in order; a row's label is one of them, else a class number, or a list of either
            (several labels, a 0/1 vector).  None: labels are regression targets.

    Raises:
        DataError: a slow tokenizer.  SettingsError: `max_length` below 2.
    """
    check_limits(max_length, "right")
    require_offsets(tokenizer)
    numbers = None if labels is None else {name: i for i, name in enumerate(labels)}
    drafts = (attempt(_Labelled(e["id"], e), _label_draft, tokenizer, numbers) for e in examples)
    options = {"truncation": True, "max_length": max_length}
    return apart(attempt(row, _label_row, tokenizer) for row in _with_tokens(drafts, tokenizer, **options))


def encode_tokens(
    example: Example, tokenizer: Tokenizer, tags: Sequence[str], *, max_length: int
) -> Encoded | Rejected:
    """One row of `encode_tokens_all`."""
    used, rejected = encode_tokens_all([example], tokenizer, tags, max_length=max_length)
    return used[0] if used else rejected[0]


def encode_tokens_all(
    examples: Iterable[Example], tokenizer: Tokenizer, tags: Sequence[str], *, max_length: int
) -> tuple[list[Encoded], list[Rejected]]:
    """Tagged words: a word's first token has its tag's number, its others and the special tokens have -100.

    Args:
        tags: the tag names in order; a row's `tags` are of them, or numbers.

    Raises:
        DataError: a slow tokenizer.  SettingsError: `max_length` below 2.
    """
    check_limits(max_length, "right")
    require_offsets(tokenizer)
    numbers = {name: i for i, name in enumerate(tags)}
    drafts = (attempt(_Labelled(e["id"], e), _tag_draft, numbers) for e in examples)
    options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
    return apart(attempt(row, _tag_row) for row in _with_tokens(drafts, tokenizer, **options))


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A row on its way: the example, what to tokenise of it, the class numbers, the tokens."""

    id: str
    example: Example
    text: Any = None
    target: Any = None
    encoding: Any = None


def _label_draft(row: _Labelled, tokenizer: Tokenizer, numbers: Mapping[str, int] | None) -> _Labelled:
    text, pair = _said(row.example, tokenizer), row.example.get("text_pair")
    if not text.strip():
        raise RowError("empty text")
    if row.example.get("label") is None:
        raise RowError("label is missing")
    target = _label(row.example["label"], numbers)
    return replace(row, text=text if pair is None else (text, pair), target=target)


def _label_row(row: _Labelled, tokenizer: Tokenizer) -> EncodedLabel:
    found = row.encoding
    extra = doubled(found.ids, tokenizer)
    kinds = array("i", found.type_ids[extra:]) if "token_type_ids" in tokenizer.model_input_names else None
    return EncodedLabel(array("i", found.ids[extra:]), row.target, row.id, kinds, bool(found.overflowing))


def _tag_draft(row: _Labelled, numbers: Mapping[str, int]) -> _Labelled:
    words, tags = row.example["tokens"], row.example["tags"]
    if not words:
        raise RowError("empty text")
    if len(words) != len(tags):
        raise RowError("tokens and tags differ in number", f"{len(words)} tokens, {len(tags)} tags")
    return replace(row, text=list(words), target=[_class(tag, numbers, "tag") for tag in tags])


def _tag_row(row: _Labelled) -> Encoded:
    found = row.encoding
    labels = array("i", [IGNORE]) * len(found.ids)
    last = None
    for i, word in enumerate(found.word_ids):
        if word is not None and word != last:
            labels[i] = row.target[word]
        last = word
    if labels.count(IGNORE) == len(labels):
        raise RowError("target cut away", f"no word is among the {len(labels)} tokens")
    return Encoded(array("i", found.ids), labels, row.id, bool(found.overflowing))


def _with_tokens(
    rows: Iterable[_Labelled | Rejected], tokenizer: Tokenizer, **options: Any
) -> Iterator[_Labelled | Rejected]:
    for chunk in chunks(rows):
        texts = [row.text for row in chunk if isinstance(row, _Labelled)]
        tokens = iter(encodings(tokenizer, texts, **options))
        for row in chunk:
            yield replace(row, encoding=next(tokens)) if isinstance(row, _Labelled) else row


def _said(example: Example, tokenizer: Tokenizer) -> str:
    if "text" in example:
        return str(example["text"])
    messages = [{k: v for k, v in message.items() if k != "train"} for message in example["messages"]]
    if tokenizer.chat_template is None:
        return "\n".join(str(message["content"]) for message in messages)
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _label(label: Any, numbers: Mapping[str, int] | None) -> Label:
    if numbers is None:
        try:
            return float(label)
        except (TypeError, ValueError):
            raise RowError("label is not a number", f"found {label!r}") from None
    if isinstance(label, (list, tuple)):
        on = {_class(item, numbers, "label") for item in label}
        return tuple(float(i in on) for i in range(len(numbers)))
    return _class(label, numbers, "label")


def _class(name: Any, numbers: Mapping[str, int], what: str) -> int:
    number = numbers.get(str(name))
    if number is not None:
        return number
    if isinstance(name, int) and 0 <= name < len(numbers):
        return int(name)
    raise RowError(f"unknown {what}", f"{name!r}{did_you_mean(str(name), numbers)}")
