"""From a file of examples to rows that a trainer takes: read, recognised, split, tokenised, packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from pegbox.core.errors import DataError, ModelError, SettingsError
from pegbox.data.collate import LabelCollator, PackedCollator, PadCollator
from pegbox.data.encoded import Rejected
from pegbox.data.examples import Examples, read, split
from pegbox.data.packing import pack, require_packing
from pegbox.data.rejects import Reject
from pegbox.data.templates import prove
from pegbox.data.tokenise import encode_all, encode_classification_all, encode_each, encode_tokens_all
from pegbox.train.settings import RunSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pegbox.core import Method

# kind of data -> what is learned from it unless the settings say otherwise
OBJECTIVES = {
    "chat": "sft",
    "text": "causal_lm",
    "tokenised": "causal_lm",
    "classification": "sequence_classification",
    "regression": "regression",
    "tagging": "token_classification",
}
LANGUAGE = ("sft", "causal_lm")
WIDTHS = 6  # of batches under torch.compile, which traces each anew and gives up after eight
REJECTED, REJECTED_VALID = "rejected.jsonl", "rejected_valid.jsonl"


@dataclass(frozen=True)
class Source:
    """Examples before a model is known.

    Attributes:
        labels: class or tag names in the order of the head; None where there is no head.
        hash: of all that the training examples hold; ids_hash: of their ids alone.
    """

    train: Examples
    valid: Examples | None
    objective: str
    labels: tuple[str, ...] | None
    multi_label: bool
    hash: str
    ids_hash: str


@dataclass(frozen=True)
class Rows:
    """Rows for the trainer."""

    train: Any
    valid: Sequence[Any] | None
    collate: Callable[..., Any]
    lines: list[str] = field(default_factory=list)  # what the user is told


# -- examples ------------------------------------------------------------------------------------------------------


def source(settings: RunSettings, output: Path | None) -> Source:
    """Read and recognise the data of a run.

    Args:
        output: where rejected rows are listed, if anywhere.

    Raises:
        DataError: nothing there, no known layout, or a kind of data that no objective here learns from.
    """
    options: dict[str, Any] = {"columns": dict(settings.columns) or None, "strict": settings.strict}
    options |= {"kind": _kind(settings.objective), "streaming": settings.streaming}
    train = read(settings.data, limit=settings.limit, rejected_to=output and output / REJECTED, **options)
    valid = None
    if settings.valid is not None:
        valid = read(settings.valid, rejected_to=output and output / REJECTED_VALID, **options | {"streaming": False})
    elif settings.valid_share:
        train, valid = _split(train, settings)
    objective = _objective(settings, train)
    labels, multi = _labels(train, valid, objective)
    return Source(train, valid, objective, labels, multi, *_hashes(train, settings))


def _split(whole: Examples, settings: RunSettings) -> tuple[Examples, Examples]:
    if settings.streaming:
        raise SettingsError("valid_share cannot cut a stream whose length is unknown; give valid= a file of its own")
    train, valid = split(whole, settings.valid_share, settings.seed)
    train.rejected = whole.rejected  # rows that fail in tokenising join those that failed in reading
    train.counts.read += whole.counts.rejected
    train.counts.rejected = whole.counts.rejected
    return train, valid


def _kind(objective: str) -> str | None:
    return {"sequence_classification": "classification", "regression": "regression"}.get(objective)


def _objective(settings: RunSettings, examples: Examples) -> str:
    natural = OBJECTIVES.get(examples.kind)
    if natural is None:
        raise DataError(
            f"{examples.source} holds {examples.kind} data, and no objective here learns from it; "
            f"known: {', '.join(OBJECTIVES)}"
        )
    wanted = settings.objective
    if wanted in ("auto", natural) or (wanted in LANGUAGE and natural in LANGUAGE):
        return natural if wanted == "auto" else wanted
    raise SettingsError(f"objective {wanted} does not fit {examples.source}, which holds {examples.kind} data")


def _labels(train: Examples, valid: Examples | None, objective: str) -> tuple[tuple[str, ...] | None, bool]:
    """Class names of both parts, and whether a row may have several."""
    key = {"sequence_classification": "label", "token_classification": "tags"}.get(objective)
    if key is None:
        return None, False
    if not isinstance(train.rows, Sequence):
        raise DataError(f"{objective} needs all labels before training, which a stream does not give; streaming=false")
    values = [row[key] for part in (train, valid) if part is not None for row in part]
    multi = key == "label" and any(isinstance(value, list) for value in values)
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if all(isinstance(item, int) for item in flat):
        return tuple(str(number) for number in range(max(flat) + 1)), multi
    return tuple(sorted({str(item) for item in flat})), multi


def _hashes(examples: Examples, settings: RunSettings) -> tuple[str, str]:
    """Of contents and of ids; of a stream, of where it comes from."""
    if not isinstance(examples.rows, Sequence):
        named = hashlib.blake2b(f"stream of {settings.data}, {settings.limit}".encode(), digest_size=16).hexdigest()
        return named, named
    content, ids = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for row in examples:
        content.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
        ids.update(f"{row['id']}\n".encode("utf-8", "surrogatepass"))
    return content.hexdigest(), ids.hexdigest()


# -- rows ------------------------------------------------------------------------------------------------------------


def rows(found: Source, settings: RunSettings, model: nn.Module, tokenizer: Tokenizer, method: Method) -> Rows:
    """Tokenise a run's examples, and pack them where that is asked for.

    Raises:
        DataError: no row is left.
        ModelError: packing for a model or a method that cannot have it.
    """
    pad: Any = (tokenizer.pad_token_id, -(-settings.max_length // WIDTHS) if settings.compile else None)
    if settings.packing:
        _check_packing(found, settings, model, method)
    if settings.streaming:
        stream = _Stream(found.train, settings, tokenizer)
        return Rows(stream, _encode(found.valid, found, settings, tokenizer), PadCollator(*pad))
    train = _encode(found.train, found, settings, tokenizer)
    valid = _encode(found.valid, found, settings, tokenizer)
    assert train is not None
    if settings.packing:
        packing = pack(train, settings.max_length, seed=settings.seed)
        held = pack(valid, settings.max_length, seed=settings.seed).rows if valid else None
        return Rows(packing.rows, held, PackedCollator(*pad), [f"packed: {packing}"])
    classifies = found.objective in ("sequence_classification", "regression")
    return Rows(train, valid, LabelCollator(*pad) if classifies else PadCollator(*pad))


def _check_packing(found: Source, settings: RunSettings, model: nn.Module, method: Method) -> None:
    if found.objective not in LANGUAGE:
        raise SettingsError(f"packing is for language modelling, not for {found.objective}; set packing=false")
    if settings.streaming:
        raise SettingsError("packing needs all rows before training; set packing=false or streaming=false")
    if "tokens" in method.traits.seams:
        raise ModelError(
            f"{method.name()} puts tokens before every row, and a packed row holds several examples; set packing=false"
        )
    require_packing(model)


def _encode(examples: Examples | None, found: Source, settings: RunSettings, tokenizer: Tokenizer) -> list[Any] | None:
    if examples is None:
        return None
    used: Sequence[Any]
    if found.objective in LANGUAGE:
        used, lost = encode_all(examples, tokenizer, **_language(settings))
    elif found.objective == "token_classification":
        used, lost = encode_tokens_all(examples, tokenizer, found.labels or (), max_length=settings.max_length)
    else:
        used, lost = encode_classification_all(examples, tokenizer, found.labels, max_length=settings.max_length)
    _note(examples, lost)
    if not used:
        raise DataError(f"{examples.source}: no row is left after tokenising; {examples.rejected.summary()}")
    return list(used)


def _language(settings: RunSettings) -> dict[str, Any]:
    return {
        "max_length": settings.max_length,
        "truncation": settings.truncation,
        "assistant_only": settings.assistant_only,
        "template": settings.template,
    }


def _note(examples: Examples, lost: Iterable[Rejected]) -> None:
    """List rows that failed in tokenising with those that failed in reading."""
    for row in lost:
        examples.counts.used -= 1
        examples.counts.rejected += 1
        examples.rejected.add(Reject(row.id, examples.source, 0, row.reason, row.detail, None))


class _Stream(IterableDataset[Any]):
    """Rows tokenised as they are read; every pass reads anew."""

    def __init__(self, examples: Examples, settings: RunSettings, tokenizer: Tokenizer) -> None:
        self.examples, self.tokenizer, self.settings = examples, tokenizer, settings
        chat = examples.kind == "chat"
        self.proof = prove(tokenizer, settings.template) if chat else None

    def __iter__(self) -> Iterator[Any]:
        for row in encode_each(self.examples, self.tokenizer, proof=self.proof, **_language(self.settings)):
            if isinstance(row, Rejected):
                _note(self.examples, [row])
            else:
                yield row
