"""The main job: from settings to a trained, saved adapter, with everything that was done written beside it.

    result = train(run_settings({"model": "minilm", "data": "train.csv", "method": "lora", "output": "out"}))

`output` then holds the adapter, `manifest.json`, `metrics.jsonl`, the rows that could not be used in `rejected.jsonl`,
and `checkpoint-N/`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.core import Tuned
from pegbox.core.errors import SettingsError
from pegbox.train import checkpoint as checkpoints
from pegbox.train.arguments import arguments
from pegbox.train.hardware import peak_memory
from pegbox.train.interrupt import Interrupt, Interrupted
from pegbox.train.manifest import Manifest
from pegbox.train.prepare import Job, is_main, prepare
from pegbox.train.preview import show_first
from pegbox.train.progress import MetricsFile, Progress
from pegbox.train.settings import RunSettings
from pegbox.train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        output: its folder, which holds the adapter.
        steps: optimizer steps, those before a resume included.
        metrics: of the saved adapter on the held-out examples, by plain name (`loss`, `accuracy`, ...); empty without.
        train_loss: mean over the steps of this call.
        trained, total: parameters.
        seconds: of training and evaluation.
        peak_memory: bytes.
        manifest: what `manifest.json` holds.
    """

    output: Path
    objective: str
    labels: tuple[str, ...] | None
    steps: int
    metrics: dict[str, float]
    train_loss: float | None
    trained: int
    total: int
    seconds: float
    peak_memory: int
    tuned: Tuned
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def train(settings: RunSettings) -> RunResult:
    """Run.

    Raises:
        PegboxError: what is wrong with the settings, the data or the model.
        Interrupted: Ctrl-C; a checkpoint is saved (a `SystemExit` with code 130).
    """
    output = output_folder(settings.output)
    _check_output(settings, output)
    manifest = Manifest(output if is_main() else None, settings=dataclasses.asdict(settings), seed=settings.seed)
    try:
        return _run(settings, output, manifest)
    except (Interrupted, KeyboardInterrupt):
        manifest.end("interrupted")
        raise
    except BaseException as error:
        manifest.end("failed", error=f"{type(error).__name__}: {error}")
        raise


def output_folder(name: str) -> Path:
    """A folder that can be written, made if need be.

    Raises:
        SettingsError: it cannot be made, or is a file.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output {name!r} cannot be a folder ({error.strerror}); choose another") from error
    return folder


def _check_output(settings: RunSettings, output: Path) -> None:
    if settings.resume is None and not settings.dry_run and checkpoints.checkpoints(output):
        raise SettingsError(
            f"output {settings.output!r} holds checkpoints of an earlier run; resume=auto goes on from the last one, "
            "or give another output"
        )


def _say(line: Any) -> None:
    if is_main():
        print(line, flush=True)


def _run(settings: RunSettings, output: Path, manifest: Manifest) -> RunResult:
    job = prepare(settings, output, _say)
    some, all_ = job.tuned.count()
    manifest.update(
        objective=job.found.objective,
        method=dataclasses.asdict(job.tuned.method) | {"name": job.tuned.method.name()},
        data=_data(job),
        labels=job.found.labels,
        dtype=job.dtype,
        trained_parameters=some,
        total_parameters=all_,
    )
    if is_main() and isinstance(job.rows.train, list):
        show_first(job.rows.train[0], job.tokenizer, job.found.labels)
    trainer, interrupt = _trainer(job, output)
    started = time.perf_counter()
    if not settings.dry_run:
        _fit(trainer, interrupt, settings, output, manifest)
        _save(job, trainer, output)
    result = RunResult(
        output=output,
        objective=job.found.objective,
        labels=job.found.labels,
        steps=trainer.state.global_step,
        metrics=_held_out(trainer),
        train_loss=_train_loss(trainer),
        trained=some,
        total=all_,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        tuned=job.tuned,
        tokenizer=job.tokenizer,
        manifest=manifest.facts,
    )
    named = ("steps", "metrics", "train_loss", "seconds", "peak_memory")
    manifest.end("planned" if settings.dry_run else "done", **{name: getattr(result, name) for name in named})
    _say(f"planned    {output}" if settings.dry_run else f"saved      {output} ({result.seconds:.1f} s)")
    return result


def _data(job: Job) -> dict[str, Any]:
    """Rows of both parts, `read` = `used` + `rejected`, and hashes of the training part."""
    found = job.found
    facts = {"hash": found.hash, "ids_hash": found.ids_hash, **dataclasses.asdict(found.train.counts)}
    if found.valid is not None:
        facts["valid"] = dataclasses.asdict(found.valid.counts)
    return facts


def _trainer(job: Job, output: Path) -> tuple[Trainer, Interrupt]:
    from transformers import EarlyStoppingCallback, PrinterCallback

    settings, objective = job.settings, job.objective
    evaluates = job.rows.valid is not None
    interrupt = Interrupt()
    callbacks: list[Any] = [Progress(), MetricsFile(output), interrupt]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = Trainer(
        job.tuned,
        objective,
        arguments(settings, objective, evaluates=evaluates),
        train_dataset=job.rows.train,
        eval_dataset=job.rows.valid,
        data_collator=job.rows.collate,
        extra=job.extra,
        facts=job.facts,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, interrupt


def _fit(trainer: Trainer, interrupt: Interrupt, settings: RunSettings, output: Path, manifest: Manifest) -> None:
    with interrupt:
        trainer.train(resume_from_checkpoint=settings.resume)
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if interrupt.wanted and step < steps:
        manifest.update(steps=step)
        _say(f"interrupted after step {step} of {steps}; {output}/checkpoint-{step} is saved, resume=auto goes on")
        raise Interrupted


def _save(job: Job, trainer: Trainer, output: Path) -> None:
    trainer.save_model(str(output))
    if is_main():
        if job.settings.template is not None:
            from pegbox.data.templates import template_of

            job.tokenizer.chat_template = template_of(job.tokenizer, job.settings.template)
        job.tokenizer.save_pretrained(output)


def _held_out(trainer: Trainer) -> dict[str, float]:
    """Metrics of the weights that are kept: those of the best step where one is chosen, else of the last."""
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    best = trainer.state.best_global_step
    kept = [line for line in lines if line["step"] == best] or lines
    timings = ("_runtime", "_per_second")
    last = kept[-1] if kept else {}
    return {k.removeprefix("eval_"): v for k, v in last.items() if k.startswith("eval_") and not k.endswith(timings)}


def _train_loss(trainer: Trainer) -> float | None:
    lines = [line["train_loss"] for line in trainer.state.log_history if "train_loss" in line]
    return lines[-1] if lines else None
