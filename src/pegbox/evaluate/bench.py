"""What all runs of a comparison share: data tokenised once, one base that is tuned again and again, and test rows."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox import anatomy, objectives
from pegbox.core import Method, Tuned
from pegbox.core.adapter import check_plain
from pegbox.core.errors import MethodError, SettingsError, TargetError
from pegbox.core.fingerprint import fingerprint
from pegbox.core.seeding import seeded
from pegbox.data.examples import Examples, read, split
from pegbox.evaluate import memory
from pegbox.objectives.objective import Objective
from pegbox.train.arguments import arguments, check_optimizer
from pegbox.train.datasets import Rows, Source, rows, source, task_names
from pegbox.train.hardware import choose_dtype
from pegbox.train.model import Loaded, load
from pegbox.train.prepare import check_method, put_on
from pegbox.train.probe import ROWS_AT_ONCE, Features, Probe, features, head, put
from pegbox.train.run import output_folder
from pegbox.train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from pegbox.evaluate.compare_settings import CompareSettings


@dataclass(frozen=True)
class Trained:
    """A tuned model and what its training took: parameters, seconds, bytes."""

    tuned: Tuned
    trained: int
    seconds: float
    peak: int | None


@dataclass(frozen=True)
class Held:
    """Rows, those of similar length side by side, so that batches hold little padding; and what makes batches."""

    rows: list[Any]
    collate: Callable[[Sequence[Any]], dict[str, Any]]

    @classmethod
    def of(cls, made: Rows) -> Held:
        return cls(sorted(made.train, key=len), made.collate)

    def __len__(self) -> int:
        return len(self.rows)


def _strictest(methods: Sequence[Method], packing: bool) -> Method:
    """The method that asks most of rows: not to be packed, or, where they are not, their tasks.

    Raises:
        SettingsError: two number tasks in ways of their own.
    """
    asking = [m for m in methods if "task_ids" in m.reads]
    numbered = list(dict.fromkeys(m.tasks_known() for m in asking if m.tasks_known()))
    if len(numbered) > 1:
        told = " and ".join(", ".join(names) for names in numbered[:2])
        raise SettingsError(f"methods of one comparison number tasks alike, and these do not: {told}")
    picky = [m for m in methods if not m.traits.packs] if packing else asking
    return (picky or methods)[0]


class Bench:
    """Args:
    given: methods, all that will be compared; the dtype is one that suits every one of them.

    Attributes:
        methods: the same, told what tasks the data names.
    """

    def __init__(self, settings: CompareSettings, given: Mapping[str, Method], say: Callable[[str], None]) -> None:
        self.settings = settings
        output = output_folder(settings.output)
        self.found, test = _sources(settings, output)
        self.objective: Objective = objectives.get(self.found.objective).given(settings.objective_settings)
        check_optimizer(settings)
        names = task_names(self.found)
        self.methods = {name: method.with_tasks(names) for name, method in given.items()}
        methods = list(self.methods.values())
        for method in methods:
            check_method(self.objective, method)
        trains_base = any(not m.traits.keeps_base for m in methods)
        self.dtype, why = choose_dtype(settings.dtype, trains_base=trains_base)
        say(f"data       {self.found.train.announcement}; objective {self.found.objective}")
        say(f"dtype      {why}" + (", so all of them do" if trains_base and settings.dtype == "auto" else ""))
        self._loaded: Loaded | None = None
        loaded = self.loaded()
        for method in methods:
            wanted = tuple(method.selects(loaded.model, anatomy.of(loaded.model)))
            check_plain(loaded.model, "", f"{method.name()} trains the base's own tensors", wanted)
        self.base = fingerprint(loaded.model, without=loaded.new)
        strictest = _strictest(methods, settings.packing)
        alone = dataclasses.replace(self.found, valid=None)
        self.rows: Rows = rows(alone, settings, loaded.model, loaded.tokenizer, strictest)
        self.test = self._held(test, strictest)
        if test.counts.rejected:
            say(f"test       left out: {test.rejected.summary()}")
        assert self.found.valid is not None
        self.valid = self._held(self.found.valid, strictest)
        self.probe: Probe | None = None

    def _held(self, part: Examples, method: Method) -> Held:
        """Rows to choose or to judge on, which are never packed: each has a number of its own."""
        alone = dataclasses.replace(self.found, train=part, valid=None)
        loaded = self.loaded()
        made = rows(alone, replace(self.settings, packing=False), loaded.model, loaded.tokenizer, method)
        return Held.of(made)

    # -- the base --------------------------------------------------------------------------------------------------

    def loaded(self) -> Loaded:
        """The untouched base and its tokenizer."""
        if self._loaded is None:
            self._loaded = load(
                self.settings.model,
                self.found.objective,
                labels=self.found.labels,
                multi_label=self.found.multi_label,
                dtype=self.dtype,
                attention=self.settings.attention,
                quantise=self.settings.quantise,
            )
        return self._loaded

    def leave(self, tuned: Tuned) -> None:
        """Take the adapter off; a base that was trained itself is dropped, and loaded again when it is needed."""
        touched = not tuned.method.traits.keeps_base
        tuned.detach()
        if touched:
            self._loaded = None

    def check(self, name: str, method: Method) -> None:
        """Raise, with its name, where a method cannot be put on the base."""
        loaded = self.loaded()
        try:
            put_on(self.settings, loaded, method, seed=0).detach()
        except (SettingsError, TargetError, MethodError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _start_head(self, loaded: Loaded, seed: int) -> None:
        """New modules as the seed draws them, or a classifier as the probe found it."""
        for path in loaded.new:
            module: Any = loaded.model.get_submodule(path)
            with seeded(seed, f"new/{path}"):
                module.reset_parameters()
        if self.probe is not None:
            put(self.probe, head(loaded.model))

    # -- one run ---------------------------------------------------------------------------------------------------

    def train(
        self, method: Method, *, rate: float, seed: int, steps: int | None, callbacks: Sequence[TrainerCallback] = ()
    ) -> Trained:
        """Train one adapter."""
        loaded = self.loaded()
        self._start_head(loaded, seed)
        memory.forget_peak()
        start = time.perf_counter()
        tuned = put_on(self.settings, loaded, method, seed)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._trainer(tuned, rate, seed, steps, folder, callbacks).train()
        except BaseException:
            self.leave(tuned)
            raise
        seconds, peak = time.perf_counter() - start, memory.peak()
        for parameter in tuned.trainable().values():
            parameter.grad = None
        return Trained(tuned.eval(), tuned.count()[0], seconds, peak)

    def _trainer(
        self, tuned: Tuned, rate: float, seed: int, steps: int | None, folder: str, callbacks: Sequence[TrainerCallback]
    ) -> Trainer:
        from transformers import PrinterCallback

        quiet = {"save_strategy": "no", "logging_strategy": "no", **self.settings.args}
        chosen = replace(self.settings, learning_rate=rate, seed=seed, output=folder, args=quiet)
        if steps is not None:
            chosen = replace(chosen, max_steps=steps)
        trainer = Trainer(
            tuned,
            self.objective,
            arguments(chosen, self.objective, evaluates=False),
            train_dataset=self.rows.train,
            data_collator=self.rows.collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    # -- measuring -------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, held: Held) -> dict[str, Tensor]:
        """Predictions of rows in their order, reduced to what the deciding metric needs."""
        model.eval()
        kept = [self.objective.predict(model, batch) for batch in self._batches(model, held)]
        joined = {key: torch.cat([k[key].cpu() for k in kept]) for key in kept[0]}
        return reduced(self.objective, joined)

    def _batches(self, model: nn.Module, held: Held) -> Iterator[dict[str, Any]]:
        device = next(model.parameters()).device
        for start in range(0, len(held), ROWS_AT_ONCE):
            batch = held.collate(held.rows[start : start + ROWS_AT_ONCE])
            yield {key: value.to(device) for key, value in batch.items()}

    def measure(self, predictions: dict[str, Tensor]) -> float:
        """The metric that decides, of what `predict` gave."""
        if "right" in predictions:
            return float(predictions["right"].mean())
        return self.objective.measure(predictions)[self.objective.best]

    @property
    def extra(self) -> dict[str, Any]:
        """What is kept with an adapter, so that it can be loaded again."""
        kept: dict[str, Any] = {"objective": self.found.objective}
        if self.found.labels is not None:
            kept |= {"labels": list(self.found.labels), "multi_label": self.found.multi_label}
        if self.objective.options is not None:
            kept["objective_settings"] = dataclasses.asdict(self.objective.options)
        return kept

    @property
    def is_single_label(self) -> bool:
        """Whether each row has one class, so that there are a majority class and a linear probe."""
        return self.found.objective == "sequence_classification" and not self.found.multi_label

    def features(self, held: Held) -> Features:
        """What the untouched base's head reads."""
        return features(self.loaded().model, held.rows, held.collate)

    @property
    def training_rows(self) -> Held:
        return Held.of(self.rows)


def reduced(objective: Objective, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    """For one class a row, whether each is right, (N,): all that accuracy needs, and quick to draw from."""
    labels = predictions.get("labels")
    if objective.best != "accuracy" or labels is None or predictions["logits"].ndim != 2 or labels.ndim != 1:
        return predictions
    return {"right": predictions["logits"].argmax(-1).eq(labels).double()}


def _sources(settings: CompareSettings, output: Path) -> tuple[Source, Any]:
    """Training and validation examples, and those to test on."""
    found = source(settings, output)
    if found.valid is None:
        raise SettingsError("compare chooses learning rates on held-out examples; give valid=FILE or valid_share=0.15")
    if settings.test is None:
        train, test = split(found.train, settings.test_share, settings.seed + 1)
        train.rejected = found.train.rejected
        return dataclasses.replace(found, train=train), test
    kind = found.train.kind if found.train.kind in ("classification", "regression") else None
    return found, read(settings.test, columns=dict(settings.columns) or None, kind=kind)
