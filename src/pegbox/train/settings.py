"""The settings of one run: what `pegbox train` takes as `key=value`, a YAML file holds, and Python passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pegbox.core.errors import SettingsError
from pegbox.core.settings import build, setting

ObjectiveName = Literal[
    "auto", "causal_lm", "sft", "seq2seq", "sequence_classification", "regression", "token_classification",
    "image_classification", "dpo", "ipo", "orpo", "simpo", "kto", "reward",
]  # fmt: skip

Quantise = Literal["none", "nf4", "int8", "int4"]
Opening = Literal["auto", "none", "nf4", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One training run, from a base and a file of examples to an adapter."""

    model: str = setting("", "a folder, a hub id, or a model that ships in an installed package")
    data: str = setting("", "a file, a folder of files, or a hub id")
    method: str = setting("lora", "a name from `pegbox methods`, or the path of a method file")
    method_settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of the method"})
    output: str = setting("out", "folder of the run: adapter, checkpoints, metrics, manifest")

    objective: ObjectiveName = setting("auto", "what is learned; read off the data if auto")  # noqa: RUF009
    objective_settings: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the objective: objective.beta=0.1"}
    )
    start_from: str | None = setting(None, "folder of an adapter of the same method to start from instead of its draws")
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
    head_rate: float = setting(
        1.0, "learning rate of a new head, and of also_train, as a multiple of learning_rate", above=0
    )
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
    quantise: Quantise = setting("none", "keep the base in a few bits: nf4, with double quantisation, is QLoRA's")  # noqa: RUF009
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
    "adapter_name_or_path": "start_from",
    "adapters": "start_from",
    "lora_model_dir": "start_from",
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
    "quantize": "quantise",
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
    "rlhf_type": "objective",
    "rl": "objective",
}

# what other tools say in those that mean `quantise` -> ours; `none` is as if it were not said
_BITS = {4: "nf4", 8: "int8", 16: "none", 32: "none"}
QUANTISE_WORDS: dict[str, dict[Any, str]] = {
    "load_in_4bit": {True: "nf4", False: "none"},
    "load_in_8bit": {True: "int8", False: "none"},
    "bits": _BITS,
    "quantization_bit": _BITS,
    "quant_bits": _BITS,
}

# what other tools call the settings of an objective -> ours
OBJECTIVE_ALIASES = {
    "pref_beta": "beta",
    "simpo_gamma": "gamma",
    "dpo_label_smoothing": "label_smoothing",
    "center_rewards_coefficient": "centre",
    "precompute_ref_log_probs": "precompute",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
}


def with_quantise(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what other tools say of a quantised base, `load_in_4bit=true`, said as `quantise=nf4`.

    Raises:
        SettingsError: a value that they do not have, or two that do not go together.
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        words = QUANTISE_WORDS.get(key)
        if words is None:
            ours, said = key, value
        elif isinstance(value, (bool, int)) and value in words:
            ours, said = "quantise", words[value]
        else:
            allowed = ", ".join(str(word).lower() for word in words)
            raise SettingsError(f"{key} must be one of {allowed}, got {value!r}; quantise=nf4 is its name here")
        if words is not None and said == "none":
            continue
        if ours in out:
            raise SettingsError(f"{ours} is given twice, as {key!r} too")
        out[ours] = said
    return out


def run_settings(values: Mapping[str, Any], *, cls: type[RunSettings] = RunSettings) -> RunSettings:
    """Settings from plain values, with the names of other tools accepted, `method.KEY` for the method's own and
    `objective.KEY` for the objective's.

    A key that only the method knows (`lora_r`, `rank`) goes to the method, one that only a named objective knows
    (`beta`) to that.  `method` and `objective` may be mappings with a `name`.

    Raises:
        SettingsError: an unknown key (with the nearest one), a wrong type or range, one setting given twice.
    """
    import dataclasses

    from pegbox import methods, objectives

    values = with_quantise(values)
    known = {f.name for f in dataclasses.fields(cls)}
    method = methods.get(_method_of(values))
    theirs = methods.SETTING_ALIASES.keys() | method.aliases.keys() | {f.name for f in dataclasses.fields(method)}
    learned = _objective_settings(values)
    own: dict[str, Any] = {}
    inner = {group: dict(values.get(f"{group}_settings") or {}) for group in ("method", "objective")}
    for key, value in values.items():
        name = key if key in known else ALIASES.get(key, key)
        group, dot, rest = key.partition(".")
        if name in ("method_settings", "objective_settings"):
            continue
        if name in inner and isinstance(value, Mapping):
            inner[name] |= {k: v for k, v in value.items() if k != "name"}
            value = value.get("name", "lora" if name == "method" else "auto")
        if dot and group in inner:
            inner[group][rest] = value
        elif dot and group in ("args", "columns"):
            own[group] = {**own.get(group, {}), rest: value}
        elif name not in known and key in theirs:
            inner["method"][key] = value
        elif name not in known and OBJECTIVE_ALIASES.get(key, key) in learned:
            inner["objective"][key] = value
        elif name in own and name not in ("args", "columns"):
            raise SettingsError(f"{name} is given twice, as {key!r} too")
        else:
            own[name] = value
    if "objective" in own:
        own["objective"] = _canonical(own["objective"])
    objective = {OBJECTIVE_ALIASES.get(key, key): value for key, value in inner["objective"].items()}
    settings = build(cls, own | {"method_settings": inner["method"], "objective_settings": objective}, what="run")
    methods.make(settings.method, settings.method_settings)
    if settings.objective != "auto":
        objectives.get(settings.objective).given(settings.objective_settings)
    return settings


def _canonical(name: Any) -> Any:
    """An objective's own name for one of its names."""
    from pegbox import objectives

    return name if name == "auto" or not isinstance(name, str) else objectives.canonical(name)


def _objective_settings(values: Mapping[str, Any]) -> frozenset[str]:
    """What the named objective can be told; nothing where none is named."""
    import dataclasses

    from pegbox import objectives

    asked = [value for key, value in values.items() if ALIASES.get(key, key) == "objective"]
    name = asked[-1].get("name", "auto") if asked and isinstance(asked[-1], Mapping) else (asked or ["auto"])[-1]
    if not isinstance(name, str) or name == "auto":
        return frozenset()
    settings = objectives.get(name).settings
    return frozenset() if settings is None else frozenset(f.name for f in dataclasses.fields(settings))


def _method_of(values: Mapping[str, Any]) -> str:
    """The method that plain values ask for, under whatever name."""
    asked = [value for key, value in values.items() if ALIASES.get(key, key) == "method"]
    method = asked[-1] if asked else "lora"
    return str(method.get("name", "lora") if isinstance(method, Mapping) else method)
