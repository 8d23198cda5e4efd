from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

V = 64
LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM | GPT2LMHeadModel:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**LLAMA))
    return GPT2LMHeadModel(GPT2Config(**GPT2))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


@pytest.fixture
def examples() -> list[Tensor]:
    """Four token sequences of different lengths."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (n,), generator=draw) for n in (12, 5, 9, 7)]


def padded(examples: list[Tensor], prompt: int = 2) -> dict[str, Tensor]:
    """A padded batch in which the first `prompt` tokens of an example are not learned."""
    ids = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(e) for e in examples], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(examples: list[Tensor], prompt: int = 2) -> dict[str, Tensor]:
    """The same in one row, positions starting again at each example."""
    labels = [torch.cat([torch.full((prompt,), -100), e[prompt:]]) for e in examples]
    positions = [torch.arange(len(e)) for e in examples]
    return {
        "input_ids": torch.cat(examples)[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels)[None],
    }
