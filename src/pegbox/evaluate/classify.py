"""Classes, scores and spans out of a model, with their names and probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import DataError, ModelError
from pegbox.core.tuned import Tuned
from pegbox.evaluate.opened import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Classified:
    """One text's answer.

    Attributes:
        label: the likeliest class; None for a regression.
        score: its probability, or the value of a regression.
        scores: of every class; independent of each other where classes are not exclusive.
        labels: the classes above one half, where classes are not exclusive.
    """

    label: str | None
    score: float
    scores: dict[str, float]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """A named stretch of a text: characters start..end, and the mean probability of its words."""

    label: str
    start: int
    end: int
    text: str
    score: float


def classify(
    what: str | os.PathLike[str] | nn.Module,
    texts: Sequence[Text],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
) -> list[Classified]:
    """The class of each text, or the value where the model is a regression.

    Args:
        what: an adapter folder, a model's name or folder, or a module.
        texts: texts, or pairs of them.

    Raises:
        ModelError: the model does not classify sequences.
    """
    model, reader = open_model(what, model=base, tokenizer=tokenizer)
    answers: list[Classified] = []
    for logits in _logits(model.eval(), reader, texts, batch_size):
        if logits.ndim != 2:
            raise ModelError(f"a {_title(model)} answers each token, not the whole; it does not classify texts")
        answers += [_classified(row, model) for row in logits]
    return answers


def spans(
    what: str | os.PathLike[str] | nn.Module,
    texts: Sequence[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[Span]]:
    """The spans that a token classifier finds in each text.  A word has the label of its first token.

    Raises:
        ModelError: the model does not classify tokens, or its tokenizer cannot say where a token stands.
    """
    model, reader = open_model(what, model=base, tokenizer=tokenizer)
    if not reader.is_fast:
        raise ModelError(f"spans need a fast tokenizer, which knows where tokens stand; got {type(reader).__name__}")
    return [_spans(text, model.eval(), reader) for text in texts]


@torch.no_grad()
def _logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], batch_size: int
) -> Iterator[Tensor]:
    """(rows, classes) of each batch, float32; rows one by one where the model has no padding id to tell them by."""
    config: Any = model.config
    size = batch_size if config.pad_token_id is not None and tokenizer.pad_token_id is not None else 1
    device = next(model.parameters()).device
    for start in range(0, len(texts), size):
        first, second = _columns(texts[start : start + size])
        inputs = tokenizer(
            first,
            second,
            padding=size > 1,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        yield model(**inputs).logits.float().cpu()


def _columns(texts: Sequence[Text]) -> tuple[list[str], list[str] | None]:
    pairs = [t for t in texts if not isinstance(t, str)]
    if not pairs:
        return [t for t in texts if isinstance(t, str)], None
    if len(pairs) < len(texts):
        raise DataError(f"texts and pairs of texts are mixed: {len(pairs)} of {len(texts)} are pairs")
    return [a for a, _ in pairs], [b for _, b in pairs]


def _classified(logits: Tensor, model: nn.Module) -> Classified:
    """logits: (classes,)"""
    config: Any = model.config
    if config.num_labels == 1:
        return Classified(None, logits.item(), {})
    several = config.problem_type == "multi_label_classification"
    shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
    names = [str(config.id2label[k]) for k in range(len(shares))]
    scores = dict(zip(names, shares, strict=True))
    best = max(scores, key=scores.__getitem__)
    above = tuple(name for name, share in scores.items() if share > 0.5) if several else ()
    return Classified(best, scores[best], scores, above)


@torch.no_grad()
def _spans(text: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, return_tensors="pt")
    offsets = encoded.pop("offset_mapping")[0].tolist()
    device = next(model.parameters()).device
    logits = model(**encoded.to(device)).logits
    if logits.ndim != 3:
        raise ModelError(f"a {_title(model)} gives one answer a text; it finds no spans")
    shares = logits[0].float().softmax(-1).cpu()  # (tokens, labels)
    words = _words(encoded.word_ids(0), offsets, shares, model)
    return [_span(text, group) for group in _grouped(words)]


@dataclass(frozen=True)
class _Word:
    tag: str
    share: float
    start: int
    end: int

    @property
    def label(self) -> str:
        return self.tag[2:] if self.tag[:2] in ("B-", "I-") else self.tag


def _words(
    ids: Sequence[int | None], offsets: Sequence[Sequence[int]], shares: Tensor, model: nn.Module
) -> list[_Word]:
    """The words of one text, from word, place (start, end) and label shares (tokens, labels) of each token."""
    names: Any = model.config.id2label  # type: ignore[union-attr]
    words: dict[int, _Word] = {}
    for k, word in enumerate(ids):
        if word is None:
            continue
        start, end = offsets[k]
        if word in words:
            seen = words[word]
            words[word] = _Word(seen.tag, seen.share, seen.start, end)
        else:
            best = int(shares[k].argmax())
            words[word] = _Word(str(names[best]), float(shares[k, best]), start, end)
    return list(words.values())


def _grouped(words: Sequence[_Word]) -> list[list[_Word]]:
    """Neighbours of one label; B- begins anew, and so does a tag without B- or I- after another label."""
    groups: list[list[_Word]] = []
    before: _Word | None = None
    for word in words:
        if word.tag != "O":
            goes_on = before is not None and before.label == word.label and before.tag != "O" and word.tag[:2] != "B-"
            if goes_on:
                groups[-1].append(word)
            else:
                groups.append([word])
        before = word
    return groups


def _span(text: str, words: Sequence[_Word]) -> Span:
    start, end = words[0].start, words[-1].end
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return Span(words[0].label, start, end, text[start:end], sum(w.share for w in words) / len(words))


def _title(model: nn.Module) -> str:
    return type(model.model if isinstance(model, Tuned) else model).__name__
