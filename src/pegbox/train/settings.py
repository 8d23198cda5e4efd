"""The settings of one run: what `pegbox train` takes as `key=value`, a YAML file holds, and Python passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pegbox.core.errors import SettingsError
from pegbox.core.settings import build, setting


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run, from a base and a file of examples to an adapter."""

    model: str = setting("", "a folder, a hub id, or a model that ships in an installed package")
    data: str = setting("", "a file, a folder of files, or a hub id")
    method: str = setting("lora", "a name from `pegbox methods`, or the path of a method file")
    method_settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of the method"})
    output: str = setting("out", "folder of the run: adapter, checkpoints, metrics, manifest")

    objective: Literal["auto", "causal_lm", "sft", "sequence_classification", "regression", "token_classification"] = (
        setting("auto", "what is learned; read off the data if auto")
    )
    also_train: str | tuple[str, ...] = setting((), "modules trained whole beside the method; a new head always is")
    warm_start: bool = setting(False, "start a new classifier from the linear probe (Kumar et al., 2022)")
    valid: str | None = setting(None, "held-out examples: a file, a folder, or a hub id")
    valid_share: float = setting(0.0, "share of the data held out where `valid` is not given", at_least=0, below=1)
    columns: Mapping[str, str] = field(default_factory=dict, metadata={"help": "renames columns: theirs to ours"})
    limit: int | None = setting(None, "use only the first so many examples", at_least=1)
    streaming: bool = setting(False, "read the data as it is needed, never whole")
    strict: bool = setting(False, "stop at the first rejected row instead of listing it")
    template: str | None = setting(None, "chat template by name, for a tokenizer that has none of its own")
    max_length: int = setting(1024, "tokens kept of an example", at_least=2)
    truncation: Literal["right", "left", "drop"] = setting("right", "which end a longer example loses; drop rejects it")
    assistant_only: bool = setting(True, "train on assistant turns alone")
    packing: bool = setting(False, "fill rows of max_length with several examples that do not see each other")

    learning_rate: float = setting(2e-4, "peak of the schedule", above=0)
    epochs: float = setting(3.0, "passes over the data", above=0)
    max_steps: int | None = setting(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = setting(8, "rows of one forward", at_least=1)
    gradient_accumulation: int = setting(1, "forwards per optimizer step", at_least=1)
    schedule: str = setting("cosine", "learning-rate schedule, by transformers' name: cosine, linear, constant, ...")
    warmup: float = setting(0.03, "steps of warm-up; below 1, a share of all steps", at_least=0)
    weight_decay: float = setting(0.0, "of matrices, decoupled", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 for never", at_least=0)
    optimizer: str = setting("adamw_torch_fused", "by transformers' name, unless the method has its own")
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", at_least=0, below=1)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "of the base")
    gradient_checkpointing: bool = setting(False, "keep block inputs only and compute the rest again: less memory")
    compile: bool = setting(False, "torch.compile the model")
    attention: str | None = setting(None, "attention implementation: sdpa, eager, flash_attention_2, ...")

    eval_steps: int | None = setting(None, "evaluate every so many steps; once an epoch if not given", at_least=1)
    save_steps: int | None = setting(None, "checkpoint every so many steps; once an epoch if not given", at_least=1)
    keep: int = setting(2, "checkpoints kept beside the best", at_least=1)
    best: str | None = setting(None, "metric that chooses the best checkpoint; the held-out loss if not given")
    patience: int | None = setting(None, "stop after so many evaluations without a better one", at_least=1)
    resume: str | None = setting(None, "a checkpoint to go on from, or `auto` for the last one in output")
    logging_steps: int = setting(10, "log every so many steps", at_least=1)
    report_to: str | tuple[str, ...] = setting("none", "trackers, by transformers' names: tensorboard, wandb, ...")
    seed: int = setting(42, "of everything that is drawn", at_least=0)
    dry_run: bool = setting(False, "prepare everything, show the plan, and stop before training")
    args: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "other transformers TrainingArguments"})


# what other tools call these settings -> ours
ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_name": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_file": "data",
    "eval_dataset": "valid",
    "val_dataset": "valid",
    "output_dir": "output",
    "tuner_type": "method",
    "train_type": "method",
    "sft_type": "method",
    "finetuning_type": "method",
    "training_type": "method",
    "adapter": "method",
    "peft_type": "method",
    "lora_modules_to_save": "also_train",
    "modules_to_save": "also_train",
    "additional_target": "also_train",
    "chat_template": "template",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "truncation_strategy": "truncation",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "optim": "optimizer",
    "label_smoothing_factor": "label_smoothing",
    "torch_dtype": "dtype",
    "attn_implementation": "attention",
    "attn_impl": "attention",
    "flash_attn": "attention",
    "torch_compile": "compile",
    "val_size": "valid_share",
    "val_set_size": "valid_share",
    "split_dataset_ratio": "valid_share",
    "max_samples": "limit",
    "save_total_limit": "keep",
    "metric_for_best_model": "best",
    "early_stopping_patience": "patience",
    "resume_from_checkpoint": "resume",
}


def run_settings(values: Mapping[str, Any], *, cls: type[RunSettings] = RunSettings) -> RunSettings:
    """Settings from plain values, with the names of other tools accepted and `method.KEY` for the method's own.

    A key that only the method knows (`lora_r`, `rank`) goes to the method.  `method` may be a mapping with a `name`.

    Raises:
        SettingsError: an unknown key (with the nearest one), a wrong type or range, one setting given twice.
    """
    import dataclasses

    from pegbox import methods

    known = {f.name for f in dataclasses.fields(cls)}
    theirs = methods.SETTING_ALIASES.keys() | {f.name for f in dataclasses.fields(methods.get(_method_of(values)))}
    own: dict[str, Any] = {}
    inner: dict[str, Any] = dict(values.get("method_settings") or {})
    for key, value in values.items():
        name = key if key in known else ALIASES.get(key, key)
        if name == "method_settings":
            continue
        if name == "method" and isinstance(value, Mapping):
            inner |= {k: v for k, v in value.items() if k != "name"}
            value = value.get("name", "lora")
        if key.startswith("method."):
            inner[key.removeprefix("method.")] = value
        elif key.startswith(("args.", "columns.")):
            group, _, rest = key.partition(".")
            own[group] = {**own.get(group, {}), rest: value}
        elif name not in known and key in theirs:
            inner[key] = value
        elif name in own and name not in ("args", "columns"):
            raise SettingsError(f"{name} is given twice, as {key!r} too")
        else:
            own[name] = value
    settings = build(cls, own | {"method_settings": inner}, what="run")
    methods.make(settings.method, settings.method_settings)
    return settings


def _method_of(values: Mapping[str, Any]) -> str:
    """The method that plain values ask for, under whatever name."""
    asked = [value for key, value in values.items() if ALIASES.get(key, key) == "method"]
    method = asked[-1] if asked else "lora"
    return str(method.get("name", "lora") if isinstance(method, Mapping) else method)
