"""Tiny models of other layouts and storage: convolutions, lookups, matrices that hold several, quantised linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3


class Convolutions(nn.Module):
    """Stride, padding, dilation, groups, a kernel of one, no bias, one dimension, circular; sizes of 9 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.stride = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.line = nn.Conv1d(12, 16, 3, padding="same", padding_mode="circular")
        self.mix = nn.Linear(16, 16)
        self.answer = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 9, 7) -> (B, CLASSES)
        h = self.groups(self.stride(x).tanh())
        h = self.line(self.point(h).flatten(2)).mean(-1)
        answer: Tensor = self.answer(self.mix(h).tanh())
        return answer


class ScaledEmbedding(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4


class Lookups(nn.Module):
    """A plain embedding with a padding token, and one that scales its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16, padding_idx=0)
        self.scaled = ScaledEmbedding(12, 16)
        self.mix = nn.Linear(16, 16)
        self.answer = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, CLASSES)
        h = self.embed(ids) + self.scaled(ids % 12)
        answer: Tensor = self.answer(self.mix(h).tanh().mean(1))
        return answer


class Only(nn.Module):
    """One layer, at `layers.site`, and a fixed one after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"site": layer})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers["site"](x)
        return y.tanh()


class Attention(nn.Module):
    """torch's attention, of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width) -> (B, T, width)
        y: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return y


def conv1d(width: int) -> nn.Module:
    """transformers' linear layer that keeps its matrix transposed."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(width, width)


def nf4(model: nn.Module) -> nn.Module:
    """Linears of the blocks as bitsandbytes keeps them for QLoRA: nf4, the scales quantised too."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def quantised(linear: nn.Linear) -> nn.Module:
        layer: Any = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer).to("cpu")
        layer.bias = linear.bias
        layer.support_avx512bf16_for_cpu = False  # its faster kernel rounds to bfloat16
        return layer

    return _with_linears(model, quantised)


def int8(model: nn.Module) -> nn.Module:
    """Linears of the blocks as bitsandbytes keeps them in eight bits."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def quantised(linear: nn.Linear) -> nn.Module:
        layer: Any = Linear8bitLt(
            linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
        )
        layer.weight = Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False).to("cpu")
        layer.bias = linear.bias
        return layer

    return _with_linears(model, quantised)


def torchao(model: nn.Module, bits: int) -> nn.Module:
    """Every linear as torchao keeps it in eight bits, or in four by groups of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    four = IntxWeightOnlyConfig(torch.int4, PerGroup(32))  # type: ignore[attr-defined]
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False) if bits == 8 else four)
    return model


def _with_linears(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A transformers model with every linear of its blocks changed; its head is left, as transformers leaves it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path.split("."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, change(module))
    return model
