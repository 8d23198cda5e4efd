"""The recipe of a base trained from scratch: what `pegbox pretrain recipe.yaml` reads.

The stages of Wu et al., "GEB-1.3B: Open Lightweight Large Language Model", 2024 (arXiv 2406.09900), and Yang et al.,
"MindLLM: Pre-training Lightweight Large Language Model from Scratch", 2023 (arXiv 2310.15777); where neither gives a
number, the default is the field's usual one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pegbox.core.errors import SettingsError
from pegbox.core.settings import build, setting

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One collection of texts."""

    path: str | tuple[str, ...] = setting("", "files, folders or hub ids; relative to the folder of the recipe")
    text: str = setting("{text}", "how a row becomes a text: its columns in braces")
    weight: float = setting(1.0, "share of the training rows, beside the other sources' weights", above=0)
    limit: int | None = setting(None, "use only the first so many texts", at_least=1)
    clean: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of `clean` for this source"})
    licence: str = setting("", "for the data card")
    cite: str = setting("", "for the data card")


@dataclass(frozen=True, kw_only=True)
class CleanSettings:
    """What is done to each text, in this order, and which texts are kept."""

    markup: bool = setting(True, "take out HTML tags, scripts and styles")
    garbled: float = setting(
        0.02, "drop a text with a larger share of undecodable or control characters; else they go", at_least=0
    )
    addresses: bool = setting(False, "replace e-mail addresses, telephone and IP numbers, and links by placeholders")
    lines: bool = setting(False, "drop lines without a letter, and web lines without closing punctuation")
    words: tuple[str, ...] = setting((), "drop a text in which one of these words occurs")
    least: int = setting(100, "drop a text of fewer characters", at_least=0)
    most: int | None = setting(None, "cut a text after so many characters", at_least=1)
    language: str | None = setting(None, "drop a text in another language than this ISO 639-1 code")
    quality: bool = setting(True, "drop a text that the rules of Gopher and C4 find no running text")
    repeats: float = setting(
        0.3, "drop a text of whose lines of four words and more a larger share is repeated", at_least=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class DuplicateSettings:
    """What counts as said before, within a source and across all of them, in the order in which they are listed."""

    exact: bool = setting(True, "drop a text whose words are those of an earlier one")
    paragraphs: bool = setting(True, "drop a paragraph that repeats the one before it")
    near: float | None = setting(
        0.8, "drop a text that shares so much with an earlier one (MinHash)", above=0, at_most=1
    )
    held_out: int | None = setting(13, "drop a text that shares so many words in a row with a held-out one", at_least=2)


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """A byte-level BPE tokenizer."""

    path: str | None = setting(None, "an existing tokenizer instead")
    size: int = setting(4096, "entries, special tokens included")
    sample: float = setting(1.0, "share of the texts that it is trained on", above=0, at_most=1)
    least: int = setting(2, "pairs seen less often are not merged", at_least=1)


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Texts as rows of tokens."""

    length: int = setting(512, "tokens of a row, the leading <s> included", at_least=8)
    packing: Literal["best_fit", "concatenate"] = setting("best_fit", "how texts fill rows; no row is padded")
    buffer: int = setting(1000, "texts that best fit chooses from", at_least=1)
    shard: int = setting(8192, "rows of a shard file", at_least=1)
    order: Literal["shuffled", "blocks"] = setting("shuffled", "rows of all sources mixed, or source after source")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A decoder of the Llama architecture; initialised from N(0, 0.02), residual outputs by 1 / sqrt(2 layers)."""

    hidden: int = setting(256, "width", at_least=8)
    layers: int = setting(8, "blocks", at_least=1)
    heads: int = setting(4, "of the queries", at_least=1)
    kv_heads: int | None = setting(None, "of keys and values; as many as of the queries if not given", at_least=1)
    mlp: int | None = setting(None, "width of the gated MLP; 8/3 of hidden, rounded up to 32, if not given", at_least=8)
    tied: bool = setting(True, "head and embedding are one matrix")
    theta: float = setting(10_000.0, "base of the rotary embedding", above=0)
    epsilon: float = setting(1e-5, "of RMSNorm", above=0)
    shrink: float = setting(1.0, "the embedding's gradient is multiplied by this (GLM-130B: 0.1)", above=0, at_most=1)
    attention: str = setting("auto", "by transformers' name; auto: sdpa, and on a CPU a faster one of our own")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimizer and its schedule."""

    steps: int | None = setting(None, "optimizer steps, instead of epochs", at_least=1)
    epochs: float = setting(1.0, "passes over as many rows as there are", above=0)
    batch: int = setting(32, "rows of one forward in one process", at_least=1)
    accumulate: int = setting(1, "forwards of an optimizer step", at_least=1)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "Muon for the blocks' matrices (torch.optim.Muon) if so named"
    )
    learning_rate: float = setting(4e-4, "peak of the schedule", above=0)
    least: float = setting(0.1, "learning rate at the end, as a share of the peak", at_least=0, at_most=1)
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "after the warm-up; wsd: warm-up, stable, decay")
    warmup: float = setting(0.02, "steps of warm-up; below 1, a share of all steps", at_least=0)
    decay: float = setting(0.2, "share of all steps in which wsd decays", above=0, at_most=1)
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW")
    weight_decay: float = setting(0.1, "of matrices, decoupled", at_least=0)
    clip: float = setting(1.0, "gradients are clipped to this norm; 0 for never", at_least=0)
    dropout: float = setting(0.0, "of attention weights", at_least=0, below=1)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of products; weights stay float32")
    saved: Literal["float32", "bfloat16"] = setting("float32", "what trained weights are rounded to, measured and kept")
    compile: bool = setting(False, "torch.compile the model")
    checkpointing: bool = setting(False, "keep block inputs only and compute the rest again: less memory")
    shard: bool = setting(False, "FSDP2: weights, gradients and optimizer state spread over the processes")
    save_steps: int = setting(200, "checkpoint every so many steps", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=1)
    eval_steps: int = setting(200, "bits per byte on held-out texts every so many steps", at_least=1)
    eval_rows: int = setting(256, "rows of each held-out source used for that; all of them at the end", at_least=1)
    logging_steps: int = setting(10, "log every so many steps", at_least=1)
    report_to: str = setting("none", "trackers, by transformers' names")


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What a spike is, and what is done about it: reject the batch; at the next ones go back and skip the data."""

    active: bool = setting(True, "watch for spikes")
    window: int = setting(50, "losses and gradient norms compared with", at_least=4)
    sigmas: float = setting(6.0, "a loss further above their mean is a spike", above=0)
    norm: float = setting(8.0, "so is a gradient norm above this multiple of their median", above=1)
    rejects: int = setting(2, "batches rejected in a row before going back", at_least=0)
    snapshot: int = setting(50, "steps between snapshots to go back to", at_least=1)
    skip: int = setting(100, "batches skipped after going back", at_least=0)
    rollbacks: int = setting(5, "times to go back before the run stops with an error", at_least=0)


@dataclass(frozen=True, kw_only=True)
class InstructSettings:
    """The supervised stage after pre-training; nothing if there is no data."""

    data: str | tuple[str, ...] = setting((), "instruction data, in any layout that `pegbox train` knows")
    select: Literal["all", "band", "lowest", "highest"] = setting("all", "by the base's own entropy of the answers")
    band: tuple[float, float] = setting((0.25, 0.75), "quantiles that `band` keeps between")
    share: float = setting(0.5, "share that `lowest` and `highest` keep", above=0, at_most=1)
    per_source: bool = setting(False, "rank examples among those of their source alone")
    method: str = setting("full", "any of `pegbox methods`")
    method_settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "its settings"})
    run: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of `pegbox train`"})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A base trained from scratch."""

    name: str = setting("base", "of the model, for its card")
    licence: str = setting("", "of the weights, for the model card, by the hub's names")
    root: str = setting("", "folder that the paths of texts start from; that of the recipe if not given")
    output: str = setting("out", "folder of corpus, tokenizer, shards, checkpoints, model and report")
    sources: Mapping[str, SourceSettings] = field(default_factory=dict, metadata={"help": "name -> path, text, weight"})
    held_out: Mapping[str, SourceSettings] = field(
        default_factory=dict, metadata={"help": "the same; never trained on"}
    )
    clean: CleanSettings = field(default_factory=CleanSettings, metadata={"help": "how texts are cleaned and chosen"})
    duplicates: DuplicateSettings = field(default_factory=DuplicateSettings, metadata={"help": "what is left out"})
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings, metadata={"help": "byte-level BPE"})
    rows: RowSettings = field(default_factory=RowSettings, metadata={"help": "how texts fill rows"})
    model: ModelSettings = field(default_factory=ModelSettings, metadata={"help": "the architecture"})
    train: TrainSettings = field(default_factory=TrainSettings, metadata={"help": "optimizer and schedule"})
    guard: GuardSettings = field(default_factory=GuardSettings, metadata={"help": "what is done about spikes"})
    instruct: InstructSettings = field(default_factory=InstructSettings, metadata={"help": "the supervised stage"})
    prompts: tuple[str, ...] = setting((), "beginnings that the report continues")
    seed: int = setting(0, "of everything that is drawn", at_least=0)
    dry_run: bool = setting(False, "read one text of each source, show sizes, compute and memory, and stop")


def recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain nested values; `train.steps` names a setting of a part as well.

    Raises:
        SettingsError: an unknown key (with the nearest one), a wrong type or range.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        _put(nested, key.split("."), value)
    parts = {
        f.name: f.default_factory for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.default_factory)
    }
    made: dict[str, Any] = {}
    for key, value in nested.items():
        if key in ("sources", "held_out"):
            made[key] = {name: _source(f"{key}.{name}", given) for name, given in _mapping(key, value).items()}
        elif key in parts:
            made[key] = build(parts[key], _mapping(key, value), what=key)  # type: ignore[arg-type]
        else:
            made[key] = value
    return build(Recipe, made, what="recipe")


def _put(nested: dict[str, Any], path: list[str], value: Any) -> None:
    for step in path[:-1]:
        inner = nested.get(step) or {}
        nested[step] = dict(inner) if isinstance(inner, Mapping) else {"path": inner}  # a source, said as its path
        nested = nested[step]
    old = nested.get(path[-1])
    nested[path[-1]] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value


def _source(name: str, given: Any) -> SourceSettings:
    values = {"path": given} if isinstance(given, (str, list, tuple)) else _mapping(name, given)
    made = build(SourceSettings, values, what=name)
    if not made.path:
        raise SettingsError(f"{name} has no path; give {name}.path=FILE")
    build(CleanSettings, made.clean, what=f"{name}.clean")
    return made


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{name} must be a mapping of settings, got {value!r}")
    return value
