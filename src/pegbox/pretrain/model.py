"""The architecture of a base, and what training it takes.

A decoder of the Llama architecture (RMSNorm before each half of a block, rotary embeddings, grouped keys and values,
gated MLP, no biases), as GEB-1.3B is: Wu et al., "GEB-1.3B: Open Lightweight Large Language Model", 2024 (arXiv
2406.09900).

    parameters = (1 or 2) V d + L (2 d^2 + 2 d k + 3 d f + 2 d) + d
    d: width   k: width of keys and values   f: width of the MLP   L: blocks   V: vocabulary; once if tied
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pegbox.core.causal_attention import causal_attention
from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.pretrain.settings import ModelSettings, TrainSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DEVIATION = 0.02  # of the weights' normal distribution at the start, as GPT-2 and Llama
BLOCKS = "pegbox_blocks"  # transformers' name of our attention


def build(settings: ModelSettings, vocabulary: int, length: int, seed: int) -> LlamaForCausalLM:
    """A model of random weights in float32: N(0, 0.02), and N(0, 0.02 / sqrt(2 L)) where a block adds to the stream.

    Args:
        vocabulary: entries of the tokenizer.
        length: tokens of the longest row.

    Raises:
        SettingsError: widths and heads that do not divide, or an unknown implementation of attention.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    _check(settings)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=mlp_width(settings),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads or settings.heads,
        max_position_embeddings=length,
        rms_norm_eps=settings.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": settings.theta},
        tie_word_embeddings=settings.tied,
        initializer_range=DEVIATION,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = _attention(settings.attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            for last in (block.self_attn.o_proj, block.mlp.down_proj):
                last.weight.mul_(1 / math.sqrt(2 * settings.layers))
    return model


def mlp_width(settings: ModelSettings) -> int:
    """As given, or 8/3 of the width, rounded up to 32."""
    return settings.mlp or 32 * math.ceil(settings.hidden * 8 / 3 / 32)


def _check(settings: ModelSettings) -> None:
    hidden, heads, kv = settings.hidden, settings.heads, settings.kv_heads or settings.heads
    if hidden % (2 * heads):
        raise SettingsError(f"model.hidden {hidden} must be a multiple of twice model.heads, {2 * heads}")
    if heads % kv:
        raise SettingsError(f"model.heads {heads} must be a multiple of model.kv_heads, got {kv}")


# -- attention -------------------------------------------------------------------------------------------------------


def _attention(name: str) -> str:
    """transformers' name of an implementation; `auto` is ours, which is its `sdpa` but on a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    known = ("auto", "eager", *AttentionInterface().valid_keys())
    if name not in known:
        raise SettingsError(f"model.attention names no implementation {name!r}{did_you_mean(name, known)}")
    if name != "auto":
        return name
    AttentionInterface.register(BLOCKS, _in_blocks)
    AttentionMaskInterface.register(BLOCKS, sdpa_mask)
    return BLOCKS


def _in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """`core.causal_attention` for whole rows on a CPU; the rest (padding, caches, dropout) is sdpa's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = attention_mask is None and not dropout and query.shape[2] == key.shape[2]
    if plain and query.device.type == "cpu":
        return causal_attention(query, key, value, scaling), None
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    return out, None


# -- sizes -----------------------------------------------------------------------------------------------------------


def parameters(settings: ModelSettings, vocabulary: int) -> int:
    """Numbers in the model, by the formula above."""
    d, layers = settings.hidden, settings.layers
    return vocabulary * d * (1 if settings.tied else 2) + layers * (_matrices(settings) + 2 * d) + d


def _matrices(settings: ModelSettings) -> int:
    """Numbers in the matrices of a block."""
    d = settings.hidden
    return 2 * d * d + 2 * d * _kv_width(settings) + 3 * d * mlp_width(settings)


def _kv_width(settings: ModelSettings) -> int:
    return settings.hidden // settings.heads * (settings.kv_heads or settings.heads)


@dataclass(frozen=True)
class Estimate:
    """What a training takes; bytes are those of one device.

    Attributes:
        parameters: numbers in the model.
        flops_per_token: of forward and backward: 6 for each number that multiplies, and attention.
        weights, gradients, optimizer: float32 masters; with `shard`, a device's part of them.
        copies: weights in bfloat16, as products read them.
        activations: what the forward of one batch keeps for the backward.
    """

    parameters: int
    flops_per_token: float
    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float

    @property
    def memory(self) -> float:
        """Bytes a device."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations

    def days(self, tokens: float, flops_per_second: float, *, devices: int = 1, share: float = 0.4) -> float:
        """Days that `tokens` take, on devices of so many FLOP/s of which training uses `share`."""
        return tokens * self.flops_per_token / (flops_per_second * devices * share) / 86_400


def estimate(
    settings: ModelSettings, vocabulary: int, length: int, training: TrainSettings, *, devices: int = 1
) -> Estimate:
    """What training takes, without building the model.

    Attention counts its causal half: 6 L d T FLOPs a token, forward and backward.  Sharded blocks are gathered one at
    a time, which `copies` counts.  Activations are those of mixed precision: the stream and what norms read in float32,
    what products read in bfloat16; attention keeps no scores.

    Args:
        length: T, tokens of a row.
        devices: that share weights, gradients and optimizer state where `training.shard` is set.
    """
    count, d, layers = parameters(settings, vocabulary), settings.hidden, settings.layers
    multiplied = count - (0 if settings.tied else vocabulary * d)  # a lookup multiplies nothing
    parts = devices if training.shard else 1
    in_blocks = layers * _matrices(settings)
    states = 8 * count if training.optimizer == "adamw" else 8 * count - 4 * in_blocks  # Muon keeps one number of each
    gathered = 2 * (in_blocks / layers + 2 * vocabulary * d) if parts > 1 else 2 * multiplied
    kept = 4 * d * layers + _kept(settings) if training.checkpointing else _kept(settings) * layers
    return Estimate(
        parameters=count,
        flops_per_token=6 * multiplied + 6 * layers * d * length,
        weights=4 * count / parts,
        gradients=4 * count / parts,
        optimizer=states / parts,
        copies=gathered,
        activations=training.batch * length * (kept + 10 * d),
    )


def _kept(settings: ModelSettings) -> int:
    """Bytes that a block keeps for each token: of its two norms, of attention, of the gated MLP."""
    d, k, f = settings.hidden, _kv_width(settings), mlp_width(settings)
    norms = 2 * (4 + 4 + 2) * d  # the stream, the normed stream, that in bfloat16
    return norms + 2 * (d + 2 * k) + 2 * d + 4 * 2 * f  # q, k, v; what attention gives; gate, its SiLU, up, product


# -- the embedding's gradient ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def shrunk_gradient(model: nn.Module, share: float) -> Iterator[None]:
    """Inside, as `shrink_gradient`."""
    handle = shrink_gradient(model, share) if share != 1 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def shrink_gradient(model: nn.Module, share: float) -> RemovableHandle:
    """Multiply the gradient of what the embedding gives by `share`, until the handle is removed.

        e' = share * e + (1 - share) * stopgrad(e)        (GLM-130B: Zeng et al., 2022, arXiv 2210.02414)

    The forward is unchanged, bit for bit.  Of weights tied to the head only the path from the input is shrunk.
    """
    embedded: Any = model.get_input_embeddings  # of transformers' models
    return embedded().register_forward_hook(lambda module, inputs, output: _Shrunk.apply(output, share))


class _Shrunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None
