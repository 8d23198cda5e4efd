"""Examples in, token ids and labels out; a row that cannot be trained on comes back with the reason.

Every function here has a list form, `..._all`, which tokenises in batches and is the one to use for a data set.
Labels are the ids themselves where a token is trained and -100 elsewhere; models shift them by one, so the label of the
first token is never used.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import DataError
from pegbox.data.encoded import (
    IGNORE,
    Encoded,
    EncodedAnswer,
    EncodedLabel,
    EncodedPair,
    Rejected,
    Truncation,
    apart,
    attempt,
    check_limits,
    chunks,
    doubled,
    encodings,
)
from pegbox.data.rejects import RowError
from pegbox.data.templates import TemplateProof, Turn, prove, render, require_offsets, trained_tokens
from pegbox.data.tokenise_labelled import (
    encode_classification,
    encode_classification_all,
    encode_tokens,
    encode_tokens_all,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "Encoded",
    "EncodedAnswer",
    "EncodedLabel",
    "EncodedPair",
    "Rejected",
    "encode",
    "encode_all",
    "encode_classification",
    "encode_classification_all",
    "encode_each",
    "encode_preference_all",
    "encode_tokens",
    "encode_tokens_all",
    "encode_unpaired_all",
]

Example = Mapping[str, Any]


# -- language modelling --------------------------------------------------------------------------------------------


def encode(
    example: Example,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation = "right",
    assistant_only: bool = True,
    template: str | None = None,
    proof: TemplateProof | None = None,
) -> Encoded | Rejected:
    """One row of `encode_each`; give it a `proof` (from `prove`) where it is called often."""
    used, rejected = encode_all(
        [example],
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        assistant_only=assistant_only,
        template=template,
        proof=proof,
    )
    return used[0] if used else rejected[0]


def encode_all(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation = "right",
    assistant_only: bool = True,
    template: str | None = None,
    proof: TemplateProof | None = None,
) -> tuple[list[Encoded], list[Rejected]]:
    """`encode_each` over all rows: those used and those rejected, each in their order."""
    each = encode_each(
        examples,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        assistant_only=assistant_only,
        template=template,
        proof=proof,
    )
    return apart(each)


def encode_each(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation = "right",
    assistant_only: bool = True,
    template: str | None = None,
    proof: TemplateProof | None = None,
) -> Iterator[Encoded | Rejected]:
    """Chat, text and pre-tokenised rows as tokens and labels, one result a row, in their order.

    Chat (`messages`, or `prompt` and `completion`): the template's text, tokenised once, with no token added; trained
    are the assistant's turns, less those marked `"train": false`.  Text: with the tokenizer's own start token and an
    EOS after it, all trained.  Pre-tokenised: taken as they are, less positions whose `attention_mask` is 0.

    Args:
        max_length: tokens kept of a row.
        truncation: cut the end ("right") or the beginning ("left", a start token stays); "drop" rejects long rows.
        assistant_only: False trains all of a conversation, except turns marked `"train": false`.
        template: as in `prove`; `proof`: its result, where there is one already.

    Raises:
        DataError: an unproven template, a slow tokenizer, or rows of no known form.
        SettingsError: `max_length` below 2, or an unknown `truncation`.
    """
    check_limits(max_length, truncation)
    require_offsets(tokenizer)
    reader = _Reader(tokenizer, assistant_only, template, proof)
    rows = _tokenised(map(reader.draft, examples), tokenizer)
    return (attempt(row, _fit, max_length, truncation, tokenizer.bos_token_id) for row in rows)


def encode_preference_all(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation = "right",
    template: str | None = None,
    proof: TemplateProof | None = None,
) -> tuple[list[EncodedPair], list[Rejected]]:
    """Preference rows (`prompt`, `chosen`, `rejected`: messages), only the two answers trained.

    Cutting from the left cuts both by as much, so that their prompts stay the same.  Settings and errors are those of
    `encode_each`.
    """
    check_limits(max_length, truncation)
    require_offsets(tokenizer)
    reader = _Reader(tokenizer, True, template, proof)
    given = list(examples)
    sides = [reader.draft(_answered(row, side)) for row in given for side in ("chosen", "rejected")]
    rows = list(_tokenised(sides, tokenizer))
    margins = [row.get("margin") for row in given]
    pairs = (_sides(*both) for both in zip(rows[::2], rows[1::2], margins, strict=True))
    return apart(attempt(pair, _fit_pair, max_length, truncation, tokenizer.bos_token_id) for pair in pairs)


def encode_unpaired_all(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation = "right",
    template: str | None = None,
    proof: TemplateProof | None = None,
) -> tuple[list[EncodedAnswer], list[Rejected]]:
    """Unpaired rows (`prompt`, `completion`: messages, `label`), only the completion trained.

    Each row gets beside it its prompt with the completion of the row half the set away, which answers another prompt
    also where the rows of one prompt stand side by side.  Settings and errors are those of `encode_each`.

    Raises:
        DataError: a single row, which has no other beside it.
    """
    rows = list(examples)
    if len(rows) < 2:
        raise DataError("unpaired rows are compared with each other's answers, so there must be at least two")
    others = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
    crossed = [{**row, "completion": other["completion"]} for row, other in zip(rows, others, strict=True)]
    each = list(
        encode_each(
            [*rows, *crossed],
            tokenizer,
            max_length=max_length,
            truncation=truncation,
            template=template,
            proof=proof,
        )
    )
    return apart(_unpaired(*both) for both in zip(rows, each[: len(rows)], each[len(rows) :], strict=True))


def _unpaired(example: Example, own: Encoded | Rejected, mismatched: Encoded | Rejected) -> EncodedAnswer | Rejected:
    if isinstance(own, Rejected):
        return own
    if isinstance(mismatched, Rejected):
        return replace(mismatched, detail="; ".join(filter(None, (mismatched.detail, "of the mismatched answer"))))
    return EncodedAnswer(own, mismatched, bool(example["label"]), own.id)


# -- drafts: rows before they are tokenised ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draft:
    """A text to tokenise: the assistant's `turns` of a conversation, or None for text, which is trained whole."""

    id: str
    text: str
    turns: tuple[Turn, ...] | None = None
    whole: bool = False  # train all but the turns marked otherwise


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens and labels before they are cut; `ends`: the place of the token that ends the last trained turn."""

    id: str
    input_ids: array[int]
    labels: array[int]
    ends: int | None


class _Reader:
    """Turns examples into drafts; the template is proven at the first conversation."""

    def __init__(
        self, tokenizer: Tokenizer, assistant_only: bool, template: str | None, proof: TemplateProof | None
    ) -> None:
        self.tokenizer, self.assistant_only, self.template, self.proof = tokenizer, assistant_only, template, proof

    def draft(self, example: Example) -> _Draft | _Row | Rejected:
        try:
            if "input_ids" in example:
                return _given(example)
            if "messages" in example:
                return self._chat(example["id"], example["messages"], example.get("tools"))
            if "completion" in example:
                return self._chat(**_answered(example, "completion"))
        except RowError as fault:
            return Rejected(example["id"], fault.reason, fault.detail)
        if "text" in example:
            return _Draft(example["id"], example["text"]) if example["text"] else Rejected(example["id"], "empty text")
        raise DataError(
            f"row {example.get('id')!r} has {', '.join(map(repr, example))}; expected messages, prompt and completion, "
            "text, or input_ids (preferences: encode_preference_all, labels: encode_classification_all, tags: "
            "encode_tokens_all)"
        )

    def _chat(self, id: str, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> _Draft:
        if self.proof is None:
            self.proof = prove(self.tokenizer, self.template)
        trained = [m for m in messages if m["role"] == "assistant" and m.get("train") is not False]
        if not trained and self.assistant_only:
            raise RowError("no trained turn", "no assistant message, or all have train: false")
        if trained and all(_says_nothing(m) for m in trained):
            raise RowError("empty target", "the assistant says nothing")
        rendered = render(messages, self.tokenizer, self.proof, tools)
        return _Draft(id, rendered.text, rendered.turns, not self.assistant_only)


def _says_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content") or ""
    more = any(value for key, value in message.items() if key not in ("role", "content", "train", "name"))
    return not more and isinstance(content, str) and not content.strip()


def _answered(example: Example, side: str) -> dict[str, Any]:
    """A prompt and one of its answers as a conversation whose other assistant turns are not trained."""
    asked = [m | {"train": False} if m["role"] == "assistant" else m for m in map(dict, example["prompt"])]
    return {"id": example["id"], "messages": asked + list(example[side]), "tools": example.get("tools")}


def _given(example: Example) -> _Row:
    try:
        ids = array("i", example["input_ids"])
        labels = array("i", ids if example.get("labels") is None else example["labels"])
    except (TypeError, OverflowError) as error:
        raise RowError("input_ids or labels are not token ids", str(error)) from error
    mask = example.get("attention_mask")
    if len(labels) != len(ids) or (mask is not None and len(mask) != len(ids)):
        raise RowError("input_ids, labels and attention_mask differ in length")
    if mask is not None:
        ids, labels = (array("i", itertools.compress(values, mask)) for values in (ids, labels))
    return _Row(example["id"], ids, labels, len(ids) - 1 if ids and labels[-1] != IGNORE else None)


# -- tokens --------------------------------------------------------------------------------------------------------


def _tokenised(drafts: Iterable[_Draft | _Row | Rejected], tokenizer: Tokenizer) -> Iterator[_Row | Rejected]:
    for chunk in chunks(drafts):
        waiting = [draft for draft in chunk if isinstance(draft, _Draft)]
        chats = iter(encodings(tokenizer, [d.text for d in waiting if d.turns is not None], add_special_tokens=False))
        texts = iter(encodings(tokenizer, [d.text for d in waiting if d.turns is None]))
        for draft in chunk:
            if not isinstance(draft, _Draft):
                yield draft
            elif draft.turns is None:
                yield _text_row(draft, next(texts), tokenizer)
            else:
                yield _chat_row(draft, draft.turns, next(chats))


def _text_row(draft: _Draft, encoding: Any, tokenizer: Tokenizer) -> _Row:
    ids, end = array("i", encoding.ids)[doubled(encoding.ids, tokenizer) :], tokenizer.eos_token_id
    if end is not None and ids[-1:] != array("i", [end]):
        ids.append(end)
    return _Row(draft.id, ids, array("i", ids), None if end is None else len(ids) - 1)


def _chat_row(draft: _Draft, turns: Sequence[Turn], encoding: Any) -> _Row:
    ids = array("i", encoding.ids)
    labels = array("i", ids) if draft.whole else array("i", [IGNORE]) * len(ids)
    ends = None
    for turn, tokens in zip(turns, trained_tokens(encoding.offsets, draft.text, turns), strict=True):
        where = slice(tokens.start, tokens.stop)
        labels[where] = ids[where] if turn.train else array("i", [IGNORE]) * len(tokens)
        if turn.train:
            ends = tokens.stop - 1 if turn.closed else None
    return _Row(draft.id, ids, labels, ends)


def _fit(row: _Row, max_length: int, truncation: Truncation, bos: int | None) -> Encoded:
    _check_trained(row.labels, "empty target")
    over = len(row.input_ids) - max_length
    if over <= 0:
        return Encoded(row.input_ids, row.labels, row.id, False, row.ends is not None)
    if truncation == "drop":
        raise RowError("too long", f"{len(row.input_ids)} tokens of at most {max_length}")
    return _cut(row, over, truncation, bos)


def _cut(row: _Row, over: int, truncation: Truncation, bos: int | None) -> Encoded:
    """The row less `over` tokens of one end."""
    ids, labels, kept = row.input_ids, row.labels, 0
    if truncation == "right":
        ids, labels = ids[:-over], labels[:-over]
    else:
        kept = 1 if ids[0] == bos else 0
        ids, labels = ids[:kept] + ids[kept + over :], labels[:kept] + labels[kept + over :]
    _check_trained(labels, "target cut away")
    end_kept = row.ends is not None and (row.ends < len(ids) if truncation == "right" else row.ends >= kept + over)
    return Encoded(ids, labels, row.id, True, end_kept)


def _check_trained(labels: array[int], reason: str) -> None:
    if labels.count(IGNORE) >= len(labels) - (bool(labels) and labels[0] != IGNORE):
        raise RowError(reason, f"none of {len(labels)} tokens is trained")


@dataclass(frozen=True, slots=True)
class _Sides:
    id: str
    chosen: _Row
    rejected: _Row
    margin: float | None = None


def _sides(chosen: _Row | Rejected, rejected: _Row | Rejected, margin: float | None) -> _Sides | Rejected:
    for side, row in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(row, Rejected):
            return replace(row, detail=f"{side}: {row.detail}" if row.detail else side)
    assert isinstance(chosen, _Row)
    assert isinstance(rejected, _Row)
    return _Sides(chosen.id, chosen, rejected, margin)


def _fit_pair(pair: _Sides, max_length: int, truncation: Truncation, bos: int | None) -> EncodedPair:
    sides = (pair.chosen, pair.rejected)
    if pair.chosen.input_ids == pair.rejected.input_ids:
        raise RowError("chosen and rejected are the same")
    over = max(len(row.input_ids) for row in sides) - max_length
    if truncation != "left" or over <= 0:
        one, other = (_fit(row, max_length, truncation, bos) for row in sides)
    else:
        one, other = (_cut(row, _prompt_cut(row, over, max_length), "left", bos) for row in sides)
    return EncodedPair(one, other, pair.id, pair.margin)


def _prompt_cut(row: _Row, over: int, max_length: int) -> int:
    """Tokens to cut from the left, where the longer side has `over` too many: of the shorter, prompt only."""
    prompt = next(i for i, label in enumerate(row.labels) if label != IGNORE)
    return max(len(row.input_ids) - max_length, min(over, prompt - 1))
