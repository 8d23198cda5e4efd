"""How modules keep their matrix.  The one file that knows layouts.

A matrix is read (out, in), whatever the module keeps:

    nn.Linear       (out, in)                     as it is
    Conv1D          (in, out)                     transposed (transformers' linear layer)
    nn.Conv1d...3d  (out, in / groups, k, ...)    in = in / groups * k * ..., flattened
    nn.Embedding    (num, dim)                    transposed: out = dim, in = num, as HF PEFT's LoRA has it
    experts         (experts, out, in)            as it is, or (experts, in, out) transposed

A layout also knows how a low-rank update of its matrix acts on what the module is called with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pegbox.core.low_rank import Down, as_matrix, low_rank_product

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear,)
MATRIX: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def is_conv1d(module: nn.Module | type[nn.Module]) -> bool:
    """Whether a module, or a class of them, is transformers' Conv1D, a linear layer that keeps (in, out)."""
    cls = module if isinstance(module, type) else type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of whatever class."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def of_kind(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of one of `kinds`; Conv1D counts as a Linear."""
    return isinstance(module, kinds) or (nn.Linear in kinds and is_conv1d(module))


class Layout(ABC):
    """How one kind of module keeps its matrix."""

    features_last = True  # whether the module maps (..., in) to (..., out)

    @abstractmethod
    def read(self, kept: Tensor) -> Tensor:
        """The kept tensor as (out, in)."""

    @abstractmethod
    def stored(self, value: Tensor, shape: torch.Size) -> Tensor:
        """(out, in) in the shape in which it is kept."""

    def product(self, module: nn.Module, x: Tensor, down: Down, up: Tensor, scale: float) -> Tensor:
        """What `scale * up @ down`, added to the matrix, adds to the module's output for x."""
        return low_rank_product(x, down, up, scale)


class AsItIs(Layout):
    """nn.Linear, and whatever is no matrix: the weight of a norm, a bias."""

    def read(self, kept: Tensor) -> Tensor:
        return kept

    def stored(self, value: Tensor, shape: torch.Size) -> Tensor:
        return value


class Transposed(Layout):
    """Conv1D, and experts that keep (experts, in, out)."""

    def read(self, kept: Tensor) -> Tensor:
        return kept.transpose(-2, -1)

    def stored(self, value: Tensor, shape: torch.Size) -> Tensor:
        return value.transpose(-2, -1)


class Convolution(Layout):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d."""

    features_last = False

    def read(self, kept: Tensor) -> Tensor:
        return kept.flatten(1)

    def stored(self, value: Tensor, shape: torch.Size) -> Tensor:
        return value.reshape(shape)

    def product(self, module: nn.Module, x: Tensor, down: Down, up: Tensor, scale: float) -> Tensor:
        """A convolution to r channels, a group's own r for each group, and one of width 1 to `out`."""
        assert isinstance(module, _ConvNd)
        kernel = module.weight.shape[1:]  # (in / groups, k, ...)
        low = as_matrix(down, kernel.numel(), up).to(x.dtype).unflatten(1, kernel)  # (r, in / groups, k, ...)
        repeated = low.repeat(module.groups, *[1] * len(kernel))
        h = module._conv_forward(x, repeated, None)  # (B, groups * r, ...)
        point = (scale * up).to(x.dtype)[(...,) + (None,) * (len(kernel) - 1)]  # (out, r, 1, ...)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 2]
        return conv(h, point, groups=module.groups)


class Lookup(Layout):
    """nn.Embedding."""

    features_last = False  # it is called with ids

    def read(self, kept: Tensor) -> Tensor:
        return kept.T

    def stored(self, value: Tensor, shape: torch.Size) -> Tensor:
        return value.T

    def product(self, module: nn.Module, x: Tensor, down: Down, up: Tensor, scale: float) -> Tensor:
        """Columns of `down`; the row of `padding_idx` gets no gradient, as in the module itself."""
        assert isinstance(module, nn.Embedding)
        columns = F.embedding(x, as_matrix(down, module.num_embeddings, up).T)  # (..., r)
        y = F.linear(columns, scale * up).to(module.weight.dtype)  # (..., dim)
        if module.padding_idx is None:
            return y
        return torch.where((x == module.padding_idx)[..., None], y.detach(), y)


_AS_IT_IS, _TRANSPOSED, _CONVOLUTION, _LOOKUP = AsItIs(), Transposed(), Convolution(), Lookup()

_FORWARDS = {  # kind: its own forward; a subclass with another is not taken for it
    nn.Linear: nn.Linear.forward,
    nn.Conv1d: nn.Conv1d.forward,
    nn.Conv2d: nn.Conv2d.forward,
    nn.Conv3d: nn.Conv3d.forward,
    nn.Embedding: nn.Embedding.forward,
}


def layout_of(module: nn.Module, parameter: str) -> Layout:
    """How a module keeps one of its own parameters."""
    kept = getattr(module, parameter)
    if parameter == "weight":
        if is_conv1d(module):
            return _TRANSPOSED
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return _CONVOLUTION
        if isinstance(module, nn.Embedding):
            return _LOOKUP
    # transformers' expert modules say themselves how they keep their matrices
    if kept is not None and kept.dim() == 3 and module.__dict__.get("is_transposed") is True:
        return _TRANSPOSED
    return _AS_IT_IS


def computes_plainly(module: nn.Module) -> bool:
    """Whether a module's forward is that of its kind: for a subclass with its own, nothing is known of its output."""
    if is_conv1d(module):
        return True
    forward = type(module).forward
    return any(isinstance(module, kind) and forward is own for kind, own in _FORWARDS.items())
