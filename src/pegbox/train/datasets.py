"""From a file of examples to rows that a trainer takes: read, recognised, split, tokenised, packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from pegbox import objectives
from pegbox.core.errors import DataError, ModelError, SettingsError, did_you_mean
from pegbox.data.collate import (
    AnswerCollator,
    LabelCollator,
    PackedCollator,
    PackedPairCollator,
    PadCollator,
    PairCollator,
    TargetCollator,
    TaskCollator,
)
from pegbox.data.encoded import Rejected
from pegbox.data.examples import Examples, read, split
from pegbox.data.identity import content_id
from pegbox.data.images import ImageCollator, encode_images_all
from pegbox.data.packing import pack, pack_pairs, require_packing
from pegbox.data.rejects import Reject
from pegbox.data.templates import prove
from pegbox.data.tokenise import (
    encode_all,
    encode_classification_all,
    encode_each,
    encode_preference_all,
    encode_tokens_all,
    encode_unpaired_all,
)
from pegbox.data.tokenise_targets import encode_targets_all
from pegbox.objectives.preference import Referred
from pegbox.train.precompute import with_reference
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
    "image": "image_classification",
    "preference": "dpo",
    "unpaired": "kto",
}
LANGUAGE = ("sft", "causal_lm")
PAIRS = ("dpo", "ipo", "orpo", "simpo", "reward")
# objective -> kinds of data it learns from, beside those it is the natural one of
LEARNS_FROM = {
    **dict.fromkeys(LANGUAGE, ("chat", "text", "tokenised")),
    **dict.fromkeys(PAIRS, ("preference",)),
    "seq2seq": ("chat",),
}
PACKED = (*LANGUAGE, "dpo", "ipo", "orpo", "simpo")
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
    """The kind of layout to look for, where rows could be taken for several."""
    kinds = {"sequence_classification": "classification", "regression": "regression", "kto": "unpaired"}
    return kinds.get(objective)


def _objective(settings: RunSettings, examples: Examples) -> str:
    natural = OBJECTIVES.get(examples.kind)
    if natural is None:
        raise DataError(
            f"{examples.source} holds {examples.kind} data, and no objective here learns from it; "
            f"known: {', '.join(OBJECTIVES)}"
        )
    wanted = natural if settings.objective == "auto" else settings.objective
    check_fit(wanted, examples)
    return wanted


def check_fit(wanted: str, examples: Examples) -> None:
    """Raise SettingsError where an objective does not learn from such examples."""
    if wanted != OBJECTIVES.get(examples.kind) and examples.kind not in LEARNS_FROM.get(wanted, ()):
        kinds = LEARNS_FROM.get(wanted) or tuple(kind for kind, name in OBJECTIVES.items() if name == wanted)
        raise SettingsError(
            f"objective {wanted} does not fit {examples.source}, which holds {examples.kind} data "
            f"({examples.format.name}); {wanted} learns from {' or '.join(kinds)} data, and {examples.kind} data is "
            f"for {_learners(examples.kind)}"
        )


def _learners(kind: str) -> str:
    """The objectives that learn from a kind of data."""
    others = [name for name, kinds in LEARNS_FROM.items() if kind in kinds]
    return ", ".join(dict.fromkeys([OBJECTIVES[kind], *others]))


def _labels(train: Examples, valid: Examples | None, objective: str) -> tuple[tuple[str, ...] | None, bool]:
    """Class names of both parts, and whether a row may have several."""
    key = {"sequence_classification": "label", "image_classification": "label", "token_classification": "tags"}.get(
        objective
    )
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
        content.update(_spelled(row).encode("utf-8", "surrogatepass") + b"\n")
        ids.update(f"{row['id']}\n".encode("utf-8", "surrogatepass"))
    return content.hexdigest(), ids.hexdigest()


def _spelled(row: dict[str, Any]) -> str:
    """All that an example holds, in one line; of an image what is in it, wherever it lies."""
    if "image" in row:
        return f"{row['id']} {content_id(row)}"
    return json.dumps(row, sort_keys=True, default=str)


# -- rows ------------------------------------------------------------------------------------------------------------


def rows(found: Source, settings: RunSettings, model: nn.Module, tokenizer: Tokenizer, method: Method) -> Rows:
    """Tokenise a run's examples, and pack them where that is asked for.

    Args:
        tokenizer: the model's; of a vision model, its image processor.

    Raises:
        DataError: no row is left.
        ModelError: packing for a model or a method that cannot have it.
    """
    if settings.packing:
        _check_packing(found, settings, model, method)
    collate = _collator(found.objective, settings, tokenizer)
    if tasks := _tasks(found, settings, method):
        collate = TaskCollator(collate, tasks)
    if settings.streaming:
        if found.objective not in LANGUAGE:
            raise SettingsError(f"streaming is for language modelling, not for {found.objective}; set streaming=false")
        return Rows(
            _Stream(found.train, settings, tokenizer), _encode(found.valid, found, settings, tokenizer), collate
        )
    train = _encode(found.train, found, settings, tokenizer)
    valid = _encode(found.valid, found, settings, tokenizer)
    assert train is not None
    lines = []
    if _asks_first(found, settings):
        train, valid = (held and with_reference(held, model, collate, settings.batch_size) for held in (train, valid))
        lines.append("asked the base once for the log-probabilities that it is compared with")
    assert train is not None
    return (
        _packed(train, valid, found, settings, tokenizer, lines)
        if settings.packing
        else Rows(train, valid, collate, lines)
    )


def task_names(found: Source) -> tuple[str, ...]:
    """Of the tasks that rows are of, where they say so by names; sorted."""
    return tuple(sorted({task for task in _tasks_told(found).values() if isinstance(task, str)}))


def _tasks_told(found: Source) -> dict[str, Any]:
    """What each row says of its task, by the row's id; nothing of a stream's."""
    parts = [part for part in (found.train, found.valid) if part is not None and isinstance(part.rows, Sequence)]
    return {row["id"]: row.get("task") for part in parts for row in part}


def _tasks(found: Source, settings: RunSettings, method: Method) -> dict[str, int]:
    """The number of each row's task, by the row's id, for a method that asks for tasks; none where no row has one.

    Raises:
        DataError: some rows have none, or one that the method does not know.
    """
    if "task_ids" not in method.reads:
        return {}
    told = _tasks_told(found)
    given = {task for task in told.values() if task is not None}
    if not given:
        return {}
    if without := [id for id, task in told.items() if task is None]:
        raise DataError(f"{found.train.source}: row {without[0]} has no task, and others have ({len(without)} of them)")
    if settings.packing:
        raise SettingsError(f"{method.name()} takes rows of one task each, and packed rows hold several; packing=false")
    named = task_names(found)
    known = method.tasks_known() or named
    if unknown := [task for task in named if task not in known]:
        what = f"{found.train.source}: {method.name()} knows no task {unknown[0]!r}"
        raise DataError(f"{what}{did_you_mean(unknown[0], known)}")
    return {id: known.index(task) if isinstance(task, str) else task for id, task in told.items()}


def _asks_first(found: Source, settings: RunSettings) -> bool:
    """Whether the untouched base is to be asked for what the objective compares with."""
    options = objectives.get(found.objective).given(settings.objective_settings).options
    return isinstance(options, Referred) and options.precompute


def _collator(objective: str, settings: RunSettings, tokenizer: Any) -> Callable[..., Any]:
    """What makes batches of rows that are not packed."""
    if objective == "image_classification":
        return ImageCollator(tokenizer)
    special: dict[str, Any] = dict.fromkeys(PAIRS, PairCollator) | {"kto": AnswerCollator, "seq2seq": TargetCollator}
    special |= dict.fromkeys(("sequence_classification", "regression"), LabelCollator)
    made: Callable[..., Any] = special.get(objective, PadCollator)(*_padding(settings, tokenizer))
    return made


def _padding(settings: RunSettings, tokenizer: Any) -> tuple[int, int | None]:
    return tokenizer.pad_token_id, -(-settings.max_length // WIDTHS) if settings.compile else None


def _packed(
    train: list[Any], valid: list[Any] | None, found: Source, settings: RunSettings, tokenizer: Any, lines: list[str]
) -> Rows:
    """Rows of max_length tokens, or, as a pair has two answers, of twice as many."""
    pad, held = _padding(settings, tokenizer), None
    if found.objective in PAIRS:
        pairs = pack_pairs(train, 2 * settings.max_length, seed=settings.seed)
        held = pack_pairs(valid, 2 * settings.max_length, seed=settings.seed).rows if valid else None
        return Rows(pairs.rows, held, PackedPairCollator(*pad), [*lines, f"packed: {pairs}"])
    packing = pack(train, settings.max_length, seed=settings.seed)
    whole = pack(valid, settings.max_length, seed=settings.seed).rows if valid else None
    return Rows(packing.rows, whole, PackedCollator(*pad), [*lines, f"packed: {packing}"])


def _check_packing(found: Source, settings: RunSettings, model: nn.Module, method: Method) -> None:
    if found.objective not in PACKED:
        raise SettingsError(
            f"packing is for language modelling ({', '.join(PACKED)}), not for {found.objective}; set packing=false"
        )
    if settings.streaming:
        raise SettingsError("packing needs all rows before training; set packing=false or streaming=false")
    if not method.traits.packs:
        raise ModelError(
            f"{method.name()} puts tokens before every row, and a packed row holds several examples; set packing=false"
        )
    require_packing(model)


def _encode(examples: Examples | None, found: Source, settings: RunSettings, tokenizer: Tokenizer) -> list[Any] | None:
    if examples is None:
        return None
    used, lost = _encoded(examples, found, settings, tokenizer)
    _note(examples, lost)
    if not used:
        raise DataError(f"{examples.source}: no row is left after tokenising; {examples.rejected.summary()}")
    return list(used)


def _encoded(
    examples: Examples, found: Source, settings: RunSettings, tokenizer: Any
) -> tuple[Sequence[Any], list[Rejected]]:
    """Rows used and rows rejected, by what is to be learned."""
    objective, labels = found.objective, found.labels
    cut: Any = {"max_length": settings.max_length, "truncation": settings.truncation}
    if objective in LANGUAGE:
        return encode_all(examples, tokenizer, **_language(settings))
    if objective in PAIRS:
        return encode_preference_all(examples, tokenizer, template=settings.template, **cut)
    if objective == "kto":
        return encode_unpaired_all(examples, tokenizer, template=settings.template, **cut)
    if objective == "seq2seq":
        return encode_targets_all(examples, tokenizer, **cut)
    if objective == "image_classification":
        return encode_images_all(examples, labels or ())
    if objective == "token_classification":
        return encode_tokens_all(examples, tokenizer, labels or (), max_length=settings.max_length)
    return encode_classification_all(examples, tokenizer, labels, max_length=settings.max_length)


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
