"""The model and the batch that every training pair runs on: a random Llama of about 125M parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000
ROWS, LENGTH = 4, 512
RANK, ALPHA = 16, 32.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NF4 = "nf4"  # linears but the head in bitsandbytes' nf4, doubly quantised; the rest, and products, in bfloat16


def llama(dtype: str, *, biases: bool = False) -> LlamaForCausalLM:
    """Hidden 768, 12 blocks, 12 heads, 4 KV heads, MLP 2048; the same weights every time.

    Args:
        dtype: a key of DTYPES, or NF4.
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
    if dtype == NF4:
        return _in_four_bits(LlamaForCausalLM(config).bfloat16())
    return LlamaForCausalLM(config).to(DTYPES[dtype])


def _in_four_bits(model: LlamaForCausalLM) -> LlamaForCausalLM:
    import bitsandbytes as bnb

    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                out, in_ = linear.weight.shape
                quantised = bnb.nn.Linear4bit(
                    in_, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
                )
                quantised.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(part, name, quantised.to("cpu"))
    return model


def linear_bytes(model: nn.Module) -> int:
    """What the linears of the blocks keep, with the statistics of those that are quantised."""
    blocks = (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features != VOCABULARY)
    return sum(value.numel() * value.element_size() for m in blocks for value in m.state_dict().values())


def batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Random ids, (rows, length), every token a label."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}
