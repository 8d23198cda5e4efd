"""A model on a file of examples: every metric of its objective with an interval, before tuning and after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from pegbox import objectives
from pegbox.core import Tuned
from pegbox.core.errors import DataError, ModelError
from pegbox.core.settings import setting
from pegbox.data.examples import Examples, read
from pegbox.evaluate.opened import open_adapter, open_model
from pegbox.evaluate.statistics import Estimate, difference_each, estimate_each
from pegbox.train.datasets import OBJECTIVES, Source, check_fit, rows
from pegbox.train.settings import ObjectiveName, Opening, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pegbox.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What `pegbox eval` takes as `key=value`."""

    adapter: str | None = setting(None, "folder of an adapter; it is measured before (switched off) and after")
    model: str | None = setting(None, "a whole model, or the base where the adapter does not name it")
    data: str = setting("", "a file, a folder of files, or a hub id")
    output: str | None = setting(None, "JSON file for the numbers")
    objective: ObjectiveName = setting("auto", "what is measured; read off the adapter or the data if auto")  # noqa: RUF009
    objective_settings: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the objective, in place of those the adapter learned by"}
    )
    columns: Mapping[str, str] = field(default_factory=dict, metadata={"help": "renames columns: theirs to ours"})
    limit: int | None = setting(None, "use only the first so many examples", at_least=1)
    template: str | None = setting(None, "chat template by name, for a tokenizer that has none of its own")
    max_length: int = setting(1024, "tokens kept of an example", at_least=2)
    truncation: Literal["right", "left", "drop"] = setting("right", "which end a longer example loses")
    assistant_only: bool = setting(True, "measure on assistant turns alone")
    batch_size: int = setting(32, "rows of one forward", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "of the base; auto: as its file has it")
    quantise: Opening = setting("auto", "how the base is kept; auto: as in the adapter's training")  # noqa: RUF009


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name.

    Attributes:
        after: of the model, or of the tuned one; before: of its base; change: after less before, on the same rows.
        notes: what a reader must know.
    """

    what: str
    rows: int
    after: Mapping[str, Estimate]
    before: Mapping[str, Estimate]
    change: Mapping[str, Estimate]
    notes: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = ["metric", "before", "after", "change"] if self.before else ["metric", "value"]
        table = Table(*columns, title=f"{self.what}, {self.rows} rows")
        for name, value in self.after.items():
            before = [spell(self.before[name])] if self.before else []
            change = [spell(self.change[name], signed=True)] if self.before else []
            table.add_row(name, *before, spell(value), *change)
        yield table
        yield "± is half a 95 % interval over the rows (bootstrap); the change is measured on the same rows"
        yield from self.notes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def spell(value: Estimate, *, signed: bool = False) -> str:
    return f"{value.mean:{'+' if signed else ''}.4g} ± {value.half:.2g}"


def evaluate(settings: EvalSettings) -> Evaluation:
    """Measure.

    Raises:
        DataError: data that cannot be read, or that the objective does not fit.
        AdapterError, ModelError: a model that cannot be loaded.
    """
    kept: dict[str, Any] = {"dtype": settings.dtype, "quantise": settings.quantise}
    opened = open_adapter(settings.adapter, model=settings.model, **kept) if settings.adapter else None
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    if opened is not None:
        model, tokenizer = opened.tuned, opened.tokenizer
    else:
        model, tokenizer = open_model(str(settings.model), **kept)
    if tokenizer is None:
        raise ModelError(f"{settings.adapter or settings.model} has no tokenizer beside it")
    noted = opened.file.extra if opened else {}
    kind = "unpaired" if "kto" in (settings.objective, noted.get("objective")) else None
    examples = read(settings.data, columns=dict(settings.columns) or None, limit=settings.limit, kind=kind)
    held, collate, objective = _rows(settings, examples, noted, model, tokenizer)
    ours = _predict(model, held, collate, objective, settings.batch_size)
    theirs, notes = None, [f"data: {examples.announcement}"]
    if opened is not None and opened.file.also_train:
        notes.append(f"no before: {', '.join(opened.file.also_train)} was trained with the adapter, the base has none")
    elif opened is not None and opened.tuned.method.traits.keeps_base:
        with opened.tuned.disabled():
            theirs = _predict(model, held, collate, objective, settings.batch_size)
    elif opened is not None:
        notes.append(f"no before: {opened.file.method} trained the base itself; measure the base with model=")
    result = _concluded(settings, objective, len(held), ours, theirs, notes)
    if settings.output:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.output).write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _concluded(
    settings: EvalSettings,
    objective: Objective,
    count: int,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor] | None,
    notes: list[str],
) -> Evaluation:
    measure = objective.measure
    before = estimate_each([theirs], measure) if theirs else {}
    change = difference_each([ours], [theirs], measure) if theirs else {}
    what = str(settings.adapter or settings.model)
    return Evaluation(what, count, estimate_each([ours], measure), before, change, notes)


def _rows(
    settings: EvalSettings,
    examples: Examples,
    noted: Mapping[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Any], Any, Objective]:
    """Rows sorted by length, what makes batches of them, and the objective."""
    natural = noted.get("objective") or OBJECTIVES.get(examples.kind)
    name = natural if settings.objective == "auto" else settings.objective
    if name is None:
        raise DataError(f"{examples.source} holds {examples.kind} data, which no objective here measures")
    from transformers import PreTrainedTokenizerBase

    check_fit(name, examples)
    base: Any = model.model if isinstance(model, Tuned) else model
    if name != "image_classification" and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"a {type(base).__name__} reads images, and {examples.source} holds none")
    labels = noted.get("labels")
    if labels is None and name in ("sequence_classification", "token_classification", "image_classification"):
        labels = [base.config.id2label[k] for k in range(base.config.num_labels)]
    multi = base.config.problem_type == "multi_label_classification"
    run = RunSettings(
        max_length=settings.max_length,
        truncation=settings.truncation,
        assistant_only=settings.assistant_only,
        template=settings.template,
    )
    if name != "image_classification" and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    source = Source(examples, None, name, None if labels is None else tuple(map(str, labels)), multi, "", "")
    from pegbox.methods.lora import LoRA

    method = model.method if isinstance(model, Tuned) and model.method.tasks_needed() else LoRA()
    made = rows(source, run, base, tokenizer, method)
    learned_by = noted.get("objective_settings") if noted.get("objective") == name else None
    objective = objectives.get(name).given({**(learned_by or {}), **settings.objective_settings})
    return sorted(made.train, key=len), made.collate, objective


@torch.no_grad()
def _predict(model: nn.Module, held: list[Any], collate: Any, objective: Objective, size: int) -> dict[str, Tensor]:
    model.eval()
    kept = [objective.predict(model, batch) for batch in _batches(model, held, collate, size)]
    return {key: torch.cat([k[key].cpu() for k in kept]) for key in kept[0]}


def _batches(model: nn.Module, held: list[Any], collate: Any, size: int) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    for start in range(0, len(held), size):
        yield {key: value.to(device) for key, value in collate(held[start : start + size]).items()}
