"""What a row becomes, or why it does not: the results of every encoder, and the steps they share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.data.rejects import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Label = int | float | tuple[float, ...]
Truncation = Literal["right", "left", "drop"]
T = TypeVar("T")

IGNORE = -100  # torch's cross_entropy passes over it
BATCH = 1024  # rows tokenised at once; holds their texts and offsets


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row, ready for a model.

    Attributes:
        input_ids, labels: (T,) each; 32-bit arrays as made here, any sequence of integers will do.
        truncated: tokens were cut off to fit `max_length`.
        end_trained: the token that ends the last trained turn, or the text, is trained.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    id: str
    truncated: bool = False
    end_trained: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was not used: a `reason` that rows of the same fault share, and this row's `detail`."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EncodedLabel:
    """A text and its class number, regression target, or (C,) multi-label 0/1 vector."""

    input_ids: Sequence[int]
    label: Label
    id: str
    token_type_ids: Sequence[int] | None = None
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the same prompt with two answers, only the answers trained.

    Attributes:
        margin: by how much the chosen answer is better, where the data says so.
        reference: log-probabilities of the two answers under a reference model, where they are computed already.
    """

    chosen: Encoded
    rejected: Encoded
    id: str
    margin: float | None = None
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """An answer that was wanted or not, and beside it the same prompt with an answer to another one.

    Attributes:
        reference: log-probabilities of the two answers under a reference model, where they are computed already.
    """

    answer: Encoded
    mismatched: Encoded
    desirable: bool
    id: str
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        return max(len(self.answer), len(self.mismatched))


@dataclass(frozen=True, slots=True)
class EncodedTarget:
    """A source (S,) and its target (T,), for an encoder-decoder."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    id: str
    truncated: bool = False

    def __len__(self) -> int:
        return max(len(self.input_ids), len(self.labels))


class HasId(Protocol):
    @property
    def id(self) -> str: ...


def check_limits(max_length: int, truncation: str) -> None:
    if max_length < 2:
        raise SettingsError(f"max_length is {max_length}, must be at least 2")
    if truncation not in ("right", "left", "drop"):
        raise SettingsError(f"unknown truncation {truncation!r}{did_you_mean(truncation, ('right', 'left', 'drop'))}")


def attempt(row: HasId | Rejected, step: Callable[..., T], *given: Any) -> T | Rejected:
    """The next step of a row that got this far; a row that fails in it is rejected."""
    if isinstance(row, Rejected):
        return row
    try:
        return step(row, *given)
    except RowError as fault:
        return Rejected(row.id, fault.reason, fault.detail)


def chunks(rows: Iterable[T]) -> Iterator[list[T]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, BATCH)):
        yield chunk


def apart(rows: Iterable[T | Rejected]) -> tuple[list[T], list[Rejected]]:
    used: list[T] = []
    rejected: list[Rejected] = []
    for row in rows:
        if isinstance(row, Rejected):
            rejected.append(row)
        else:
            used.append(row)
    return used, rejected


def doubled(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """1 where the tokenizer put its start token before a text that begins with one, else 0."""
    start = tokenizer.bos_token_id
    return int(start is not None and start != tokenizer.eos_token_id and list(ids[:2]) == [start, start])


def encodings(tokenizer: Tokenizer, texts: Sequence[Any], **options: Any) -> list[Any]:
    """`tokenizers.Encoding` of each text."""
    return list(tokenizer(texts, verbose=False, **options).encodings or ()) if texts else []
