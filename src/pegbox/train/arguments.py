"""The settings of a run as transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from transformers import TrainingArguments

from pegbox.core.errors import MissingExtra, SettingsError, did_you_mean
from pegbox.core.settings import coerce
from pegbox.objectives.objective import Objective
from pegbox.train.settings import RunSettings


def arguments(settings: RunSettings, objective: Objective, *, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of a run; what `settings.args` says comes last.

    Raises:
        SettingsError: an unknown argument in `args`, settings of evaluation that contradict each other, or a value
            that transformers refuses.
    """
    values: dict[str, Any] = {
        "output_dir": settings.output,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "label_smoothing_factor": settings.label_smoothing,
        "torch_compile": settings.compile,
        "logging_steps": settings.logging_steps,
        "use_cpu": not torch.accelerator.is_available(),  # else processes of torchrun would train each on its own
        "report_to": _names(settings.report_to),
        "seed": settings.seed,
        "save_total_limit": settings.keep,
        "train_sampling_strategy": "random" if settings.packing else "group_by_length",
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,  # progress.py shows the bar
        "dataloader_pin_memory": False,
    }
    values |= _when(settings, evaluates) | (_best(settings, objective) if evaluates else {})
    known = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    if settings.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        values |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    for name in settings.args:
        if name not in known:
            raise SettingsError(f"TrainingArguments has no argument {name!r} (args.{name}){did_you_mean(name, known)}")
    _check_trackers(values["report_to"])
    plain = (int, float, bool, str)
    given = {k: coerce("args", k, known[k], v) if known[k] in plain else v for k, v in settings.args.items()}
    try:
        return TrainingArguments(**values | given)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"transformers refuses these settings: {error}") from error


def _check_trackers(names: list[str]) -> None:
    """Raise SettingsError for a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    for name in names:
        if name in ("none", "all"):
            continue
        if name not in KNOWN:
            raise SettingsError(f"report_to names no tracker {name!r}{did_you_mean(name, KNOWN, most=20)}")
        try:
            KNOWN[name]()
        except (RuntimeError, ImportError) as error:
            raise SettingsError(f"report_to={name}: {error}") from error


def check_optimizer(settings: RunSettings) -> None:
    """Refuse an optimizer whose states are paged where there is nothing to page them from.

    Raises:
        SettingsError: there is no GPU.  MissingExtra: bitsandbytes, whose optimizers they are, is not installed.
    """
    name = str(settings.args.get("optim", settings.optimizer))
    if not name.startswith("paged_"):
        return
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise SettingsError(
            f"optimizer {name!r} moves its states between a GPU's memory and the machine's, and there is no GPU here; "
            "optimizer=adamw_torch_fused takes AdamW's same steps and keeps them where they are"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantised", f"optimizer={name}")


def _names(report_to: str | tuple[str, ...]) -> list[str]:
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    return [name.strip() for name in names]


def _when(settings: RunSettings, evaluates: bool) -> dict[str, Any]:
    """When to save and evaluate.  Where there is something to evaluate, saving follows it, so that the best is kept."""
    save, rate = settings.save_steps, settings.eval_steps
    for name, value in (("eval_steps", rate), ("best", settings.best), ("patience", settings.patience)):
        if value is not None and not evaluates:
            raise SettingsError(f"{name} needs held-out examples; give valid=FILE or valid_share=0.1")
    if evaluates and rate and save and save % rate:
        raise SettingsError(f"save_steps {save} is not a multiple of eval_steps {rate}, so the best step may be lost")
    if evaluates:
        save, rate = save or rate, rate or save
    when: dict[str, Any] = {"save_strategy": "steps", "save_steps": save} if save else {"save_strategy": "epoch"}
    if evaluates:
        when |= {"eval_strategy": "steps", "eval_steps": rate} if rate else {"eval_strategy": "epoch"}
    return when


def _best(settings: RunSettings, objective: Objective) -> dict[str, Any]:
    metric = settings.best or "loss"
    higher = objective.higher_is_better if metric == objective.best else metric not in LOWER_IS_BETTER
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": higher}


LOWER_IS_BETTER = ("loss", "nll", "mse", "perplexity")
