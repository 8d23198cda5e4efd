"""Training a base from scratch: `pegbox.Trainer` with the method `full`, over rows in the order of a mixture.

Iteration k reads rows k n to (k + 1) n - 1 of the data, n being the rows of all processes, shifted by what the spike
guard skips.  The trainer deals out numbers of rows only; the rows are read when their iteration begins, so that a skip
counts from the next one on and a resumed run reads the same.

Weights and optimizer state are float32; products run in bfloat16 (autocast) where the machine multiplies it fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from pegbox.api import tune
from pegbox.core import Tuned
from pegbox.core.errors import SettingsError
from pegbox.core.headless import replaced
from pegbox.core.sharded import copy_whole, whole
from pegbox.objectives.objective import Batch
from pegbox.pretrain.bits import bits_per_byte
from pegbox.pretrain.guard import Guard, position
from pegbox.pretrain.model import shrunk_gradient
from pegbox.pretrain.settings import Recipe, TrainSettings
from pegbox.train import checkpoint as checkpoints
from pegbox.train.hardware import bf16_units
from pegbox.train.interrupt import Interrupt, Interrupted
from pegbox.train.progress import MetricsFile, Progress
from pegbox.train.sharding import reshard
from pegbox.train.trainer import Trainer
from pegbox.updates.muon import MuonAdamW, split

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHECKPOINTS = "checkpoints"
ENDLESS = 1 << 40  # rows, more than any run asks for
BYTES_PER_TOKEN = 4  # about; how many texts make so many rows
# settings that change no bits of the training
UNBOUND = ("save_steps", "keep", "eval_steps", "eval_rows", "logging_steps", "report_to", "compile", "saved")

Rows = Dataset[dict[str, Tensor]]
Mark = tuple[int, float]  # iterations, seconds


@dataclass(frozen=True)
class Fitted:
    """A trained base.

    Attributes:
        model: whole, in float32, of values that `train.saved` has, on the device that it was trained on; of a sharded
            model each process gets a copy.
        steps: iterations, those that the guard rejected or lost among them.
        tokens: that these read.
        tokens_per_second: of this process's run, all processes together; evaluation and checkpoints count as time.
        bits: bits per byte of each held-out source, on all of its texts.
    """

    model: LlamaForCausalLM
    steps: int
    tokens: int
    tokens_per_second: float
    bits: Mapping[str, float]


def fit(
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Rows,
    held_out: Mapping[str, Sequence[str]],
    say: Callable[[str], None],
    *,
    facts: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train, or go on from the last complete checkpoint to the same bits.

    Into `recipe.output` go checkpoints/, metrics.jsonl and spikes.jsonl.  Every line of the log has
    `tokens_per_second`; every `eval_steps` a line has `eval_bits_NAME`, bits per byte of a held-out source.

    Args:
        model: of `pegbox.pretrain.model.build`; trained in place.
        dataset: item i is `input_ids` and `labels`, (T,) each, for any i from 0 on; its length is one pass.
        held_out: name to texts.
        say: prints a line.
        facts: what else a resumed run must have in common with this one, `{"data": hash}`.

    Raises:
        SettingsError: settings that contradict each other, or a checkpoint of a run with others.
        Diverged: the loss spikes again and again.
        Interrupted: Ctrl-C; a checkpoint is saved.
    """
    output, training = Path(recipe.output), recipe.train
    _set_dropout(model, training.dropout)
    _name_ends(model, tokenizer)
    guard = Guard(recipe.guard, output, say) if recipe.guard.active else None
    interrupt, args = Interrupt(), arguments(recipe, len(cast(Sequence[Any], dataset)), evaluates=bool(held_out))
    engine = Engine(
        tune(model, "full"),
        args,
        recipe,
        dataset,
        held_out=held_out,
        tokenizer=tokenizer,
        guard=guard,
        callbacks=[Progress(), MetricsFile(output), interrupt],
        facts=facts,
    )
    say(_described(engine))
    with interrupt, shrunk_gradient(model, recipe.model.shrink), compiled(model, training.compile):
        engine.train(resume_from_checkpoint="auto")
    count, planned = engine.state.global_step, engine.state.max_steps
    if interrupt.wanted and count < planned:
        say(f"interrupted after step {count} of {planned}; the same command goes on from there")
        raise Interrupted
    if training.saved == "bfloat16":
        _round(model)
    bits = engine.bits(held_out)
    trained = _whole(engine)
    _set_dropout(trained, 0.0)
    return Fitted(trained, count, count * engine.rows * recipe.rows.length, engine.speed, bits)


def steps(training: TrainSettings, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run over a data set of so many rows: as given, or `epochs` passes.

    Raises:
        SettingsError: the passes have fewer rows than one step.
    """
    size = training.batch * training.accumulate * processes
    found = training.steps or int(training.epochs * rows / size)
    if not found:
        raise SettingsError(
            f"{training.epochs:g} passes over {rows} rows are less than one step of {size} "
            "(train.batch x train.accumulate x processes); give a smaller train.batch or more texts"
        )
    return found


def arguments(recipe: Recipe, rows: int, *, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of a recipe over a data set of so many rows.

    Raises:
        SettingsError: a schedule that does not fit into the steps.
    """
    training, processes = recipe.train, _processes()
    count = steps(training, rows, processes)
    schedule, settings, warmup = _schedule(training, count)
    sharded: dict[str, Any] = {}
    if training.shard and processes > 1:
        sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    return TrainingArguments(
        str(Path(recipe.output) / CHECKPOINTS),
        max_steps=count,
        per_device_train_batch_size=training.batch,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=settings,
        warmup_steps=warmup,
        optim="adamw_torch_fused",
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        bf16=_bf16(training.dtype),
        use_cpu=not torch.accelerator.is_available(),  # else transformers takes bf16 for a GPU's
        activation_checkpointing=training.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if training.checkpointing else None,
        train_sampling_strategy="sequential",
        logging_steps=training.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.keep,
        report_to=training.report_to.split(","),
        seed=recipe.seed,
        disable_tqdm=True,  # Progress shows the bar
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **sharded,
    )


def _schedule(training: TrainSettings, count: int) -> tuple[str, dict[str, Any], int]:
    """transformers' name of a schedule, its settings, and steps of warm-up."""
    warmup = int(training.warmup) if training.warmup >= 1 else math.ceil(training.warmup * count)
    if training.schedule == "constant":
        return "constant_with_warmup", {}, warmup
    if warmup >= count:
        raise SettingsError(f"train.warmup takes {warmup} of {count} steps; give a smaller one")
    if training.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": training.least}, warmup
    decay = math.ceil(training.decay * count)
    if warmup + decay > count:
        raise SettingsError(f"train.warmup {warmup} and train.decay {decay} are more than the {count} steps")
    settings = {"num_decay_steps": decay, "min_lr_ratio": training.least, "decay_type": "1-sqrt"}
    return "warmup_stable_decay", settings, warmup


def _bf16(dtype: str) -> bool:
    return bool(bf16_units()) if dtype == "auto" else dtype == "bfloat16"


def _processes() -> int:
    """As `torchrun` says; accelerate must not be asked before it has the arguments."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def compiled(model: LlamaForCausalLM, wanted: bool) -> Iterator[None]:
    """Inside, the blocks run compiled, each the same graph; head and loss are chunked already."""
    with contextlib.ExitStack() as stack:
        for block in model.model.layers if wanted else ():
            stack.enter_context(replaced(block, torch.compile(block.forward)))
        yield


def _set_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Of attention weights; a setting of the training, which the model's files do not keep."""
    for block in model.model.layers:
        block.self_attn.attention_dropout = share


@torch.no_grad()
def _round(model: nn.Module) -> None:
    """To the nearest bfloat16, so that what is measured is what files in it will hold."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _name_ends(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids that generation starts, ends and pads with."""
    for config in (model.config, model.generation_config):
        assert config is not None
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def _described(engine: Engine) -> str:
    args, dtype = engine.args, "bfloat16 products, float32 weights" if engine.args.bf16 else "float32"
    tokens = args.max_steps * engine.rows * engine.recipe.rows.length
    return f"training: {args.max_steps:,} steps of {engine.rows} rows, {tokens / 1e6:,.1f}M tokens; {dtype}"


def _whole(engine: Engine) -> LlamaForCausalLM:
    """The trained model, whole; every process must call this."""
    if not engine.is_fsdp_enabled:
        return cast("LlamaForCausalLM", engine.tuned.detach())
    sharded = cast("LlamaForCausalLM", engine.tuned.model)
    made = type(sharded)(sharded.config)
    for parameter, trained in zip(made.parameters(), sharded.parameters(), strict=True):
        copy_whole(parameter, whole(trained.detach()))
    return made


class Numbers(Dataset[int]):
    """Row i is the number i; there is no last one, since a guard may add iterations."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> int:
        return index


def _collate(numbers: list[int]) -> dict[str, Tensor]:
    return {"rows": torch.tensor(numbers)}


class Engine(Trainer):
    """The loop of `fit`: deals out numbers of rows, tells the guard, measures bits per byte, counts tokens."""

    def __init__(
        self,
        tuned: Tuned,
        args: TrainingArguments,
        recipe: Recipe,
        dataset: Rows,
        *,
        held_out: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerFast,
        guard: Guard | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.data, self.held_out, self.tokenizer = recipe, dataset, held_out, tokenizer
        self.guard = guard
        self.rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._loss = torch.zeros(())  # of the iteration under way
        self._began: Mark | None = None
        self._marked: Mark | None = None  # the last line of the log
        super().__init__(
            tuned,
            "causal_lm",
            args,
            callbacks=[*callbacks, *([] if guard is None else [guard])],
            facts={**_facts(recipe), **(facts or {})},
            train_dataset=Numbers(),
            eval_dataset=Numbers() if held_out else None,
            data_collator=_collate,
        )
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.recipe.train.optimizer == "muon":
            if self.is_fsdp_enabled:
                raise SettingsError("train.optimizer=muon needs whole matrices; leave train.shard out, or use adamw")
            blocks = cast("LlamaForCausalLM", self.tuned.model).model.layers
            matrices = [p for p in blocks.parameters() if p.ndim == 2]
            groups = self.tuned.groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = MuonAdamW(*split(groups, matrices), betas=self.recipe.train.betas)
        return super().create_optimizer(model)

    # -- the iteration -------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The batches of an iteration, which all have as many labels, so that the mean of their means is the mean."""
        if self.finished():
            return [], None
        self._began = self._began or (self.state.global_step, time.perf_counter())
        self._marked = self._marked or self._began
        self._loss = torch.zeros((), device=device)
        skips = [] if self.guard is None else self.guard.skips
        batches: list[Batch] = []
        for _ in range(num_batches):
            numbers = next(epoch_iterator)["rows"].tolist()
            rows = [self.data[position(number, self.rows, skips)] for number in numbers]
            batches.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return batches, None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._loss += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The norm before clipping; the guard is told it and the loss, the same numbers in every process."""
        norm = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm), device=self.args.device))
        loss, norm = self.accelerator.reduce(torch.stack([self._loss.float(), norm.float()]), "mean").tolist()
        if self.guard is not None:
            self.guard.saw(loss, norm)
        return norm

    # -- what is measured ----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`eval_bits_NAME`: bits per byte of each held-out source, on its first `eval_rows` rows or so."""
        size = self.recipe.train.eval_rows * self.recipe.rows.length * BYTES_PER_TOKEN
        found = self.bits({name: _first(texts, size) for name, texts in self.held_out.items()})
        metrics = {f"eval_bits_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def bits(self, held_out: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Bits per byte of texts; every process measures all of them, as a sharded model needs."""
        model: Any = self.model if self.is_fsdp_enabled else self.tuned.model
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        found = {}
        with torch.compiler.set_stance("force_eager"), torch.autocast(self.args.device.type, dtype, self.args.bf16):
            for name, texts in held_out.items():
                length, batch = self.recipe.rows.length, self.args.train_batch_size
                found[name] = bits_per_byte(model, self.tokenizer, texts, length, batch=batch).per_byte
        if self.is_fsdp_enabled:
            reshard(model)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With passes over the data as `epoch`, and tokens a second since the last line."""
        step, now = self.state.global_step, time.perf_counter()
        self.state.epoch = step * self.rows / len(cast(Sequence[Any], self.data))
        if "loss" in logs and self._marked is not None:
            logs["tokens_per_second"] = self._tokens_per_second(self._marked)
            self._marked = (step, now)
        super().log(logs, start_time)

    @property
    def speed(self) -> float:
        """Tokens a second since training began in this process; 0 if there was nothing left to do."""
        return 0.0 if self._began is None else self._tokens_per_second(self._began)

    def _tokens_per_second(self, since: Mark) -> float:
        tokens = (self.state.global_step - since[0]) * self.rows * self.recipe.rows.length
        return tokens / (time.perf_counter() - since[1])

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | ({} if self.guard is None else {"guard": self.guard.export()})

    def _restore_progress(self, folder: Path) -> None:
        super()._restore_progress(folder)
        if self.guard is not None:
            self.guard.restore(checkpoints.read_seal(folder)["progress"]["guard"])


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run must have in common with this one, by the names of the recipe."""
    found: dict[str, Any] = {}
    for part in ("model", "rows", "train", "guard"):
        values = dataclasses.asdict(getattr(recipe, part))
        found |= {f"{part}.{key}": value for key, value in values.items() if key not in UNBOUND}
    return found


def _first(texts: Sequence[str], size: int) -> list[str]:
    """The first texts, of about so many bytes together."""
    found, left = [], size
    for text in texts:
        if left <= 0:
            break
        found.append(text)
        left -= len(text.encode())
    return found
