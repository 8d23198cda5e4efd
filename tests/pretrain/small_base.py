"""A base of two small blocks and one token a byte, with a chat template."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501  (one line is one template)


def tokenizer() -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), initializer_range=0.1, **sizes, **special))


def chats(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of unequal length; every third has two turns."""
    draw = random.Random(seed)
    rows = []
    for k in range(count):
        turns = [turn for n in range(1 + (k % 3 == 0)) for turn in _turn(f"say {k} {n}", "yes " * draw.randint(1, 5))]
        rows.append({"id": str(k), "messages": turns})
    return rows


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
