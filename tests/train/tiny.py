"""Two small blocks, one token a byte, and rows that take milliseconds to learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import pegbox
from pegbox.core import Tuned
from pegbox.data.collate import PadCollator
from pegbox.data.encoded import Encoded
from pegbox.train import Trainer

VOCABULARY, PAD = 259, 258
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501  (one line is one template)
COLLATE = PadCollator(PAD)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": PAD}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
            **SIZES,
            **special,
            **changes,
        )
    )


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=128, num_labels=3, pad_token_id=PAD, **SIZES)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: k for k, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def rows(count: int = 40, seed: int = 0) -> list[Encoded]:
    """Rows of unequal length, some of whose tokens are not learned."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        first = draw.randint(0, 9)
        ids = [(first + j) % 10 for j in range(draw.randint(4, 20))]
        cut = draw.randint(0, 2)
        made.append(Encoded(ids, [-100] * cut + ids[cut:], str(i)))
    return made


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    plain = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    plain |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **plain | changes)


def trainer(folder: Path | str, tuned: Tuned | None = None, objective: Any = "causal_lm", **changes: Any) -> Trainer:
    own = {
        k: changes.pop(k)
        for k in ("eval_dataset", "metrics", "callbacks", "train_dataset", "data_collator")
        if k in changes
    }
    tuned = tuned if tuned is not None else pegbox.tune(llama(), "lora", rank=4)
    args = arguments(folder, **changes)
    return Trainer(tuned, objective, args, **{"train_dataset": rows(), "data_collator": COLLATE} | own)


def losses(trained: Any) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def model_folder(folder: Path, model: Any = None) -> Path:
    """A model and its tokenizer as files."""
    (model or llama()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chat_file(path: Path, count: int = 24) -> Path:
    """Questions and answers of unequal length."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            turns = [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": "yes " * draw.randint(1, 5)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
