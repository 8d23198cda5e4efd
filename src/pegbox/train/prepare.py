"""Everything of a run that comes before its first step: data, base, method, rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox import api, methods, objectives
from pegbox.core import Method, Tuned
from pegbox.core.adapter import path_of
from pegbox.core.errors import SettingsError
from pegbox.core.fingerprint import fingerprint
from pegbox.core.method import split_names
from pegbox.core.storage import quantised_parameters
from pegbox.objectives.objective import Objective
from pegbox.objectives.preference import Referred
from pegbox.train.arguments import check_optimizer
from pegbox.train.datasets import Rows, Source, rows, source, task_names
from pegbox.train.hardware import choose_dtype
from pegbox.train.model import Loaded, load
from pegbox.train.probe import features, head, linear_probe, put
from pegbox.train.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Say = Callable[[Any], None]

EARLIER = "start_from"  # name of an adapter that another starts from, as messages say it

# settings that decide what the rows are; a resumed run must have the same
ROWS = ("max_length", "truncation", "assistant_only", "template", "packing")


@dataclass(frozen=True)
class Job:
    """A run that can start.

    Attributes:
        facts: what a resumed run must have in common with this one, beside its arguments.
        dtype: of the base.
    """

    settings: RunSettings
    found: Source
    objective: Objective
    rows: Rows
    tuned: Tuned
    tokenizer: Tokenizer
    dtype: str
    facts: dict[str, Any]

    @property
    def extra(self) -> dict[str, Any]:
        """What is kept with the adapter."""
        kept: dict[str, Any] = {"objective": self.found.objective}
        if self.found.labels is not None:
            kept |= {"labels": list(self.found.labels), "multi_label": self.found.multi_label}
        if self.settings.quantise != "none":
            kept |= {"quantise": self.settings.quantise, "dtype": self.dtype}
        if self.objective.options is not None:
            kept["objective_settings"] = asdict(self.objective.options)
        return kept


def is_main() -> bool:
    """Whether this is the first of the processes that `torchrun` started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def prepare(settings: RunSettings, output: Path, say: Say) -> Job:
    """Read the data, load the base, put the method on it, tokenise; each step is told in one line.

    Raises:
        SettingsError, DataError, ModelError, TargetError: each names what is wrong and what there is.
    """
    _check(settings)
    method = methods.make(settings.method, settings.method_settings)
    _seed(settings.seed)
    found = source(settings, output if is_main() else None)
    method = method.with_tasks(task_names(found))
    say(f"data       {found.train.announcement}; objective {found.objective}")
    objective = objectives.get(found.objective).given(settings.objective_settings)
    check_method(objective, method)
    dtype, why = choose_dtype(settings.dtype, trains_base=not method.traits.keeps_base)
    say(f"dtype      {why}")
    loaded = load(
        settings.model,
        found.objective,
        labels=found.labels,
        multi_label=found.multi_label,
        dtype=dtype,
        attention=settings.attention,
        quantise=settings.quantise,
    )
    if settings.quantise != "none":
        say(f"base       {len(quantised_parameters(loaded.model))} matrices kept as {settings.quantise}")
    base = fingerprint(loaded.model, without=loaded.new)
    made = rows(found, settings, loaded.model, loaded.tokenizer, method)
    for line in made.lines:
        say(f"rows       {line}")
    if settings.warm_start:
        _warm_start(found, loaded, made, say)
    tuned = _tuned(settings, loaded, method, say)
    facts = {"data": found.hash, "base": base, "dtype": str(dtype).removeprefix("torch.")}
    facts |= {name: getattr(settings, name) for name in ROWS}
    return Job(settings, found, objective, made, tuned, loaded.tokenizer, facts["dtype"], facts)


def check_method(objective: Objective, method: Method) -> None:
    """Raise SettingsError where the objective compares with the base, and the method, which trains it, leaves none; or
    where it does not read what the method trains."""
    asked = isinstance(objective.options, Referred) and objective.options.precompute
    if objective.refers and not method.traits.keeps_base and not asked:
        raise SettingsError(
            f"objective {objective.name} compares with the model before training, and {method.name()} trains the "
            "base's own tensors; set objective.precompute=true, which asks the base first, or use another method"
        )
    if (aside := method.read_aside()) is not None:
        raise SettingsError(f"heads of your own read {aside}, and {objective.name} has none; leave that out of a run")


def _check(settings: RunSettings) -> None:
    for name in ("model", "data"):
        if not getattr(settings, name):
            raise SettingsError(f"{name} is not given; a run needs model=FOLDER_OR_ID data=FILE")
    if settings.streaming and settings.max_steps is None:
        raise SettingsError("a stream has no length, so streaming=true needs max_steps=N")
    check_optimizer(settings)


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _warm_start(found: Source, loaded: Loaded, made: Rows, say: Say) -> None:
    """A new classifier as a linear probe on the untouched base's features finds it."""
    if found.objective != "sequence_classification" or found.multi_label or not loaded.new:
        raise SettingsError("warm_start is for a new classifier with one class a row; set warm_start=false")
    valid = None if made.valid is None else features(loaded.model, made.valid, made.collate)
    start = linear_probe(features(loaded.model, made.train, made.collate), valid, len(found.labels or ()))
    put(start, head(loaded.model))
    say(f"head       starts from a linear probe (C={start.penalty:g}, {start.seconds:.1f} s)")


def _tuned(settings: RunSettings, loaded: Loaded, method: Method, say: Say) -> Tuned:
    tuned = put_on(settings, loaded, method, settings.seed)
    if settings.start_from is not None:
        _follow(tuned, settings.start_from, say)
    if loaded.new:
        say(f"new        {', '.join(loaded.new)}: drawn afresh, trained whole")
    some, all_ = tuned.count()
    settled = ", ".join(f"{key}={value}" for key, value in asdict(method).items() if value not in (None, ()))
    say(f"method     {method.name()} ({settled})")
    say(f"parameters {some:,} of {all_:,} train ({100 * some / all_:.3g} %)")
    return tuned


def _follow(tuned: Tuned, folder: str, say: Say) -> None:
    """Start from what an earlier adapter has learned."""
    (name,) = tuned.active
    if not tuned.method.traits.keeps_base:
        raise SettingsError(
            f"start_from is for adapters, and {tuned.method.name()} trains the base's own tensors; go on with "
            f"model={folder}, if that holds a whole model, or merge it first"
        )
    api.load(tuned, folder, name=EARLIER)
    tuned.inherit(name, EARLIER)
    tuned.remove(EARLIER, then=name).train()
    say(f"start      {folder}")


def put_on(settings: RunSettings, loaded: Loaded, method: Method, seed: int) -> Tuned:
    """The method on the base; what is new there, and `also_train`, trained whole beside it."""
    from pegbox import anatomy

    wanted = split_names(settings.also_train)
    named = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    selected = set(method.selects(loaded.model, anatomy.of(loaded.model)))
    own = {path: dict(loaded.model.get_submodule(path).named_parameters()) for path in loaded.new if path}
    new = [path for path, parameters in own.items() if not all(f"{path}.{name}" in selected for name in parameters)]
    tuned = api.tune(loaded.model, method, also_train=(*named, *new), seed=seed)
    if settings.head_rate != 1:
        whole = map(path_of, tuned.adapter().copies)
        tuned.module_rates = dict.fromkeys((*whole, *own), settings.head_rate)
    return tuned
