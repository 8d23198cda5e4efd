"""End to end on real chat data: Pegbox with packed rows against PEFT with HF Trainer, padded to the batch.

Both get the same eight conversations a step, tokenised and labelled once (assistant turns alone are trained), the same
learning rate, optimizer and clipping.  PEFT's side pads the eight to the longest; Pegbox's packs them into one row.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from benchmarks.models import ALPHA, RANK, VOCABULARY, llama
from pegbox.data.builtin_templates import BUILT_IN
from pegbox.data.collate import PackedCollator, PadCollator
from pegbox.data.encoded import IGNORE, Encoded
from pegbox.data.examples import Example, read
from pegbox.data.packing import pack
from pegbox.data.tokenise import encode_all

DATA = Path("../shared/data/dolly_3k/train.jsonl.gz")
ROWS, LONGEST, WARM_UP = 8, 1024, 2
LEARNING_RATE = 1e-3
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def measure(library: str, dtype: str, steps: int, seed: int) -> dict[str, Any]:
    """Supervised tokens a second over `steps` optimizer steps after two to warm up, and the loss of every step.

    Args:
        seed: of the adapter's start, the one thing that differs from round to round.
    """
    groups = batches(steps + WARM_UP)
    clock = _Clock()
    train: Callable[..., Trainer] = {"pegbox": _pegbox, "peft": _peft}[library]
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(groups, dtype, seed, folder, clock)
        trainer.train()
    seconds = clock.seconds[WARM_UP:]
    supervised = [sum(label != IGNORE for row in group for label in row.labels[1:]) for group in groups][WARM_UP:]
    return {
        "tokens_per_second": sum(supervised) / sum(seconds),
        "supervised": sum(supervised),
        "seconds": seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "padding": _padding(groups),
    }


def batches(count: int) -> list[list[Encoded]]:
    """The first rows of the file, eight by eight."""
    examples = list(read(DATA))
    rows, _ = encode_all(examples[: (count + 1) * ROWS], tokenizer(examples), max_length=LONGEST)
    return [rows[i : i + ROWS] for i in range(0, count * ROWS, ROWS)]


def tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt on these very texts, since no tokenizer can be downloaded, with the chatml template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((m["content"] for e in examples for m in e["messages"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = BUILT_IN["chatml"]
    return fast


def _padding(groups: Sequence[Sequence[Encoded]]) -> float:
    """How many times the tokens of the rows a batch padded to its longest row holds."""
    held = sum(max(map(len, group)) * len(group) for group in groups)
    return held / sum(len(row) for group in groups for row in group)


class _Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def _arguments(folder: str, rows: int, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )


def _pegbox(groups: list[list[Encoded]], dtype: str, seed: int, folder: str, clock: _Clock) -> Trainer:
    import pegbox

    rows = [pack(group, sum(map(len, group))).rows[0] for group in groups]
    return pegbox.Trainer(
        pegbox.tune(llama(dtype), "lora", rank=RANK, alpha=ALPHA, seed=seed),
        "sft",
        _arguments(folder, 1, len(groups), seed),
        train_dataset=rows,
        data_collator=PackedCollator(0),
        callbacks=[clock],
    )


def _peft(groups: list[list[Encoded]], dtype: str, seed: int, folder: str, clock: _Clock) -> Trainer:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    model = llama(dtype)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return Trainer(
        get_peft_model(model, config),
        _arguments(folder, ROWS, len(groups), seed),
        train_dataset=[row for group in groups for row in group],
        data_collator=PadCollator(0),
        callbacks=[clock],
    )
