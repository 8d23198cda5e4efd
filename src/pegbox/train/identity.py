"""What decides the bits of a training run, by the names that users know it by."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import TYPE_CHECKING, Any

from pegbox.objectives.objective import Objective

if TYPE_CHECKING:
    from pegbox.train.trainer import Trainer

# our name -> that of transformers' TrainingArguments
ARGUMENTS = {
    "learning_rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "schedule_settings": "lr_scheduler_kwargs",
    "warmup": "warmup_steps",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "processes": "world_size",
    "optimizer": "optim",
    "optimizer_settings": "optim_args",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "label_smoothing": "label_smoothing_factor",
    "bf16": "bf16",
    "fp16": "fp16",
    "sampling": "train_sampling_strategy",
    "seed": "seed",
}


def identity(trainer: Trainer) -> dict[str, Any]:
    """Methods with their settings, objective, and every argument that bears on the numbers."""
    args, objective = trainer.args, trainer.objective
    out: dict[str, Any] = {}
    for name, method in trainer.methods.items():
        prefix = "" if len(trainer.methods) == 1 else f"{name}."
        out[f"{prefix}method"] = method.name()
        out |= {f"{prefix}method.{key}": value for key, value in dataclasses.asdict(method).items()}
    out["objective"] = objective.name if isinstance(objective, Objective) else getattr(objective, "__name__", "")
    if isinstance(objective, Objective) and objective.options is not None:
        out |= {f"objective.{key}": value for key, value in dataclasses.asdict(objective.options).items()}
    out |= {f"module_rates.{path}": by for path, by in trainer.tuned.module_rates.items()}
    values = {ours: getattr(args, theirs) for ours, theirs in ARGUMENTS.items()}
    return out | {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
