"""Methods against each other at one budget, on the user's own data.

Every method gets the same number of learning rates, tried for the same number of steps on the same rows and judged on
the same validation rows; then as many seeds with its best rate, judged on test rows that no choice has seen.  The
winner, and its best seed, are chosen on the validation rows too: the smallest of the methods that these rows hardly
tell from the best (the one-standard-error rule of Breiman et al., 1984).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pegbox.core import Tuned, files
from pegbox.core.errors import MissingExtra, SettingsError
from pegbox.evaluate import grid, memory
from pegbox.evaluate.bench import Bench
from pegbox.evaluate.compare_settings import CompareSettings, built
from pegbox.evaluate.comparison import Comparison, conclude
from pegbox.evaluate.progress import Progress
from pegbox.evaluate.run_log import Finished, Run, RunLog, Stage
from pegbox.evaluate.statistics import Predictions, mean
from pegbox.train.probe import linear_probe

# what makes two runs comparable, or not
SHARED = (
    "model", "objective", "objective_settings", "also_train", "valid_share", "test_share", "max_length", "truncation",
    "template", "assistant_only", "packing", "epochs", "max_steps", "trial_steps", "batch_size",
    "gradient_accumulation", "head_rate", "schedule", "warmup", "weight_decay", "max_grad_norm", "optimizer",
    "label_smoothing", "warm_start", "compile", "args", "seed",
)  # fmt: skip
WINNER, RUNS, PREDICTIONS = "winner", "runs", "predictions.safetensors"


def compare(settings: CompareSettings) -> Comparison:
    """Try, choose, repeat, judge; print the table and leave everything in the output folder.

    Raises:
        PegboxError: what is wrong with the settings, the data or the model.
    """
    output = Path(settings.output)
    if settings.overwrite and (output / "compare.json").is_file():
        shutil.rmtree(output)
    with Progress() as progress:
        work = _Work(settings, progress)
        with memory.settled():
            done = work.all()
    done.save(output)
    progress.show(done)
    return done


class _Work:
    """One comparison under way: each step takes what is finished from the log, and makes the rest."""

    def __init__(self, settings: CompareSettings, progress: Progress) -> None:
        self.settings, self.progress, self.output = settings, progress, Path(settings.output)
        self.bench = Bench(settings, built(settings), progress.say)
        self.methods = self.bench.methods
        for name, method in self.methods.items():
            self.bench.check(name, method)
        self.log = RunLog(self.output, self._identity())
        middles = {n: settings.rates.get(n, grid.centre(type(m))) for n, m in self.methods.items()}
        self.grids = {n: grid.rates(middle, settings.trials) for n, middle in middles.items()}

    def _identity(self) -> dict[str, Any]:
        """What the runs of this comparison share."""
        held = {"valid": self.bench.valid, "test": self.bench.test}
        rows = {k: hashlib.sha256("\n".join(r.id for r in part.rows).encode()).hexdigest() for k, part in held.items()}
        shared = {name: getattr(self.settings, name) for name in SHARED}
        return shared | rows | {"data": self.bench.found.hash, "base": self.bench.base, "dtype": str(self.bench.dtype)}

    def all(self) -> Comparison:
        settings, names = self.settings, list(self.methods)
        baselines = self._baselines()
        self.progress.start(len(names) * (settings.trials + settings.seeds), self._budget())
        trials = {name: [self._trial(name, rate) for rate in self.grids[name]] for name in names}
        chosen = {name: self._best_rate(trials[name]) for name in names}
        seeds = {
            name: [self._seed(name, chosen[name], settings.seed + k + 1) for k in range(settings.seeds)]
            for name in names
        }
        winner = self._winner(seeds)
        self._keep(self._best(seeds[winner]))
        predictions = {name: [self._predictions(f.run) for f in runs] for name, runs in seeds.items()}
        return conclude(self.bench, self._budget(), trials, seeds, predictions, baselines, winner)

    def _budget(self) -> list[str]:
        """What every method gets, in words."""
        s, found = self.settings, self.bench.found
        steps = f"{s.max_steps} steps" if s.max_steps else f"{s.epochs:g} epochs"
        tried = f"{s.trial_steps} steps" if s.trial_steps else steps
        rows = f"{len(self.bench.rows.train)} rows, chosen on {len(self.bench.valid)}, judged on {len(self.bench.test)}"
        head = "; new classifiers start from the linear probe" if self.bench.probe else ""
        grids = (f"{name} {', '.join(f'{rate:.2g}' for rate in rates)}" for name, rates in self.grids.items())
        return [
            f"every method: {s.trials} learning rates, {tried} each, then {s.seeds} seeds with the best, {steps} each; "
            f"batches of {s.batch_size * s.gradient_accumulation}{head}",
            f"data: {found.train.source}; {rows}",
            f"rates: {'; '.join(grids)}",
            *self._rule(),
        ]

    def _rule(self) -> list[str]:
        if not self.bench.is_single_label:
            return []
        return [
            "winner: of the methods within one standard error of the best on the validation rows, the one that trains "
            "fewest parameters"
        ]

    # -- choosing --------------------------------------------------------------------------------------------------

    def _score(self, value: float) -> float:
        """More is better; what diverged is worst."""
        if math.isnan(value):
            return -math.inf
        return value if self.bench.objective.higher_is_better else -value

    def _best(self, runs: list[Finished]) -> Finished:
        """By the validation rows; the first of equals."""
        return max(runs, key=lambda done: self._score(done.valid))

    def _best_rate(self, runs: list[Finished]) -> float:
        """Of rates that are equally good, the one nearest to the middle of the grid."""
        middle = mean([math.log(done.run.rate) for done in runs])
        best = max(runs, key=lambda done: (self._score(done.valid), -abs(math.log(done.run.rate) - middle)))
        return best.run.rate

    def _winner(self, seeds: dict[str, list[Finished]]) -> str:
        """Of the methods that the validation rows hardly tell from the best, the one that trains fewest parameters."""
        valid = {name: mean([done.valid for done in runs]) for name, runs in seeds.items()}
        best = max(valid, key=lambda name: self._score(valid[name]))
        least = self._score(valid[best]) - self._standard_error(valid[best])
        near = [name for name in valid if self._score(valid[name]) >= least or name == best]
        return min(near, key=lambda name: (seeds[name][0].trained, -self._score(valid[name])))

    def _standard_error(self, accuracy: float) -> float:
        """Of an accuracy on the validation rows; 0 for other metrics, whose best method wins."""
        if not self.bench.is_single_label or math.isnan(accuracy):
            return 0.0
        return math.sqrt(accuracy * (1 - accuracy) / len(self.bench.valid))

    # -- runs ------------------------------------------------------------------------------------------------------

    def _baselines(self) -> dict[str, Predictions]:
        """Predictions of the majority class and the linear probe on the test rows, where rows have one class."""
        bench = self.bench
        if not bench.is_single_label:
            if self.settings.warm_start:
                raise SettingsError("warm_start is for classification with one class a row; set warm_start=false")
            return {}
        labels = torch.tensor([row.label for row in bench.test.rows])
        classes = len(bench.found.labels or ())
        most = majority(torch.tensor([row.label for row in bench.rows.train]), len(labels), classes)
        found = {"majority class": most}
        self.progress.say("baselines  features of the frozen model")
        try:
            train, valid, test = (bench.features(part) for part in (bench.training_rows, bench.valid, bench.test))
            probe = linear_probe(train, valid, classes)
        except MissingExtra as missing:
            if self.settings.warm_start:
                raise
            self.progress.say(f"baselines  no linear probe: {missing}")
        else:
            found["linear probe"] = probe.logits(test.values)
            right = probe.accuracy(valid)
            self.progress.say(f"baselines  linear probe, C={probe.penalty:g}: validation accuracy {right:.4f}")
            bench.probe = probe if self.settings.warm_start else None
        return {name: {"right": logits.argmax(-1).eq(labels).double()} for name, logits in found.items()}

    def _run(self, name: str, stage: Stage, rate: float, seed: int) -> Run:
        return Run(name, json.dumps(asdict(self.methods[name]), sort_keys=True), stage, rate, seed)

    def _trial(self, name: str, rate: float) -> Finished:
        run = self._run(name, "trial", rate, self.settings.seed)
        return self._finished(run) or self._made(run, self.settings.trial_steps)

    def _seed(self, name: str, rate: float, seed: int) -> Finished:
        run = self._run(name, "seed", rate, seed)
        return self._finished(run) or self._made(run, None)

    def _finished(self, run: Run) -> Finished | None:
        done = self.log.finished.get(run)
        if done is not None:
            self.progress.finished(done, self.bench.objective.best, again=True)
        return done

    def _made(self, run: Run, steps: int | None) -> Finished:
        bench, callback = self.bench, self.progress.steps(run)
        trained = bench.train(self.methods[run.method], rate=run.rate, seed=run.seed, steps=steps, callbacks=[callback])
        try:
            valid = bench.measure(bench.predict(trained.tuned, bench.valid))
            done = Finished(run, valid, trained.trained, trained.seconds, trained.peak)
            if run.stage == "seed":
                done = self._judged(done, trained.tuned)
        finally:
            bench.leave(trained.tuned)
        self.log.add(done)
        self.progress.finished(done, bench.objective.best)
        return done

    def _judged(self, done: Finished, tuned: Tuned) -> Finished:
        """With the test rows predicted, and the adapter saved."""
        bench, folder = self.bench, self._folder(done.run)
        start = time.perf_counter()
        predictions = bench.predict(tuned, bench.test)
        per_row = (time.perf_counter() - start) / len(bench.test)
        files.save(tuned, folder, **bench.extra)
        bench.loaded().tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in predictions.items()}, folder / PREDICTIONS)
        return replace(done, per_row=per_row, size=(folder / files.TENSORS).stat().st_size)

    def _folder(self, run: Run) -> Path:
        name = run.method.replace(":", "-")  # peft:vera; a colon is no part of a file's name everywhere
        return self.output / RUNS / f"{name}-seed{run.seed}"

    def _predictions(self, run: Run) -> Predictions:
        return load_file(self._folder(run) / PREDICTIONS)

    def _keep(self, best: Finished) -> None:
        """The winner's best seed as `winner`."""
        target, part = self.output / WINNER, self.output / f".{WINNER}.partial"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self._folder(best.run), part, ignore=shutil.ignore_patterns(PREDICTIONS))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)


def majority(train: torch.Tensor, rows: int, classes: int) -> torch.Tensor:
    """Logits (rows, classes) that always say the most frequent class of `train` (N,)."""
    counts = torch.bincount(train, minlength=classes)
    return torch.nn.functional.one_hot(counts.argmax(), classes).float().expand(rows, classes)
