"""The model and the batch that every training pair runs on: a random Llama of about 125M parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000
ROWS, LENGTH = 4, 512
RANK, ALPHA = 16, 32.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def llama(dtype: str, *, biases: bool = False) -> LlamaForCausalLM:
    """Hidden 768, 12 blocks, 12 heads, 4 KV heads, MLP 2048; the same weights every time.

    Args:
        dtype: a key of DTYPES.
        biases: whether the projections of attention and MLP have biases.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        attention_bias=biases,
        mlp_bias=biases,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(DTYPES[dtype])


def batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Random ids, (rows, length), every token a label."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}
