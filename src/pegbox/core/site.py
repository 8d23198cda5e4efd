"""A site is a module of the base, by its path.  The one file that knows layouts.

A matrix read through a site is always (out, in, ...), whatever the module keeps: `nn.Linear` has (out, in),
transformers' `Conv1D` (in, out).  Grafts run around the site as middleware around a handler: the site takes the place
of the module's `forward`, and each graft is called with a `Base` that stands for everything beneath it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from pegbox.core.context import Context
from pegbox.core.low_rank import Down, low_rank_linear, low_rank_product

if TYPE_CHECKING:
    from pegbox.core.graft import Graft
    from pegbox.core.rows import Gathered

MATRIX: tuple[type[nn.Module], ...] = (nn.Linear,)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer that keeps (in, out)."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def of_kind(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of one of `kinds`; Conv1D counts as a Linear."""
    return isinstance(module, kinds) or (nn.Linear in kinds and is_conv1d(module))


class Site:
    """One module of the base, and the grafts that run around it."""

    def __init__(self, path: str, module: nn.Module, context: Context) -> None:
        self.path, self.module, self.context = path, module, context
        self.grafts: dict[str, Graft] = {}  # by adapter
        self.chain: tuple[Graft, ...] = ()  # those in use, innermost first
        self.gathered: Gathered | None = None  # factors by row, kept by rows.py
        self.original = module.forward
        self._patched_before = module.__dict__.get("forward")  # another library's patch, to put back
        self._bare = _Bare(module, module.forward)
        self.__signature__ = inspect.signature(module.forward)  # what generate and trainers inspect
        module.forward = self
        self._guard: RemovableHandle | None = None

    def forbid_fast_path(self) -> None:
        """Keep torch's TransformerEncoderLayer, which reads its children's weights in eval, calling this module.

        It does so only while no module in it has a hook; this one does nothing else.
        """
        self._guard = self.module.register_forward_pre_hook(_nothing)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the module's forward."""
        if self.context.bare:
            return self.original(*args, **kwargs)
        if self.context.rows is not None:
            from pegbox.core.rows import run_rows

            return run_rows(self, self.context.rows, args, kwargs)
        return Base(self, self.chain)(*args, **kwargs)

    def release(self) -> None:
        """Give the module its own forward back."""
        if self._guard is not None:
            self._guard.remove()
        if self._patched_before is None:
            del self.module.forward
        else:
            self.module.forward = self._patched_before

    @property
    def transposed(self) -> bool:
        return is_conv1d(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        out, in_ = self.read("weight").shape[:2]
        return out, in_

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def read(self, parameter: str) -> Tensor:
        """A parameter of the module, a matrix as (out, in, ...)."""
        value: Tensor = getattr(self.module, parameter)
        return value.T if self.transposed and parameter == "weight" else value

    def has(self, parameter: str) -> bool:
        return isinstance(getattr(self.module, parameter, None), Tensor)

    def stored(self, parameter: str, value: Tensor) -> Tensor:
        """`value`, oriented as `read` gives it, as the module keeps it: layout and dtype."""
        kept: Tensor = getattr(self.module, parameter)
        turned = value.T if self.transposed and parameter == "weight" else value
        return turned.to(kept.dtype).contiguous()

    def run(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The bare module with other parameters, given as `read` gives them."""
        if not values:
            return self.original(*args, **kwargs)
        if self.is_linear:
            weight, bias = self.linear_parameters(values)
            return F.linear(args[0], weight, bias)
        return self.run_whole({name: self.stored(name, value) for name, value in values.items()}, *args, **kwargs)

    def run_whole(self, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The bare module with other parameters, its children's too, by dotted name and in the module's own layout."""
        return functional_call(self._bare, {f"module.{name}": v for name, v in parameters.items()}, args, kwargs)

    @property
    def is_linear(self) -> bool:
        """Whether the module computes exactly `F.linear(x, weight, bias)` from a plain tensor.

        Not so where another library has patched its forward, to bring its weights from elsewhere say.
        """
        return self._patched_before is None and (type(self.module) is nn.Linear or self.transposed)

    def linear_parameters(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of a linear site, in the dtype the module keeps."""
        weight, bias = self.read("weight"), self.module.bias
        dtype = weight.dtype
        if "weight" in values:
            weight = values["weight"].to(dtype)
        if "bias" in values:
            bias = values["bias"].to(dtype)
        return weight, bias  # type: ignore[return-value]


def _nothing(module: nn.Module, args: Any) -> None:
    pass


class _Bare(nn.Module):
    """A module by its own forward: without its hooks, which have run already, and without grafts."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.original = module, original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class Base:
    """What a graft runs around: the bare module, with the grafts beneath it and the parameters set above it."""

    __slots__ = ("grafts", "site", "values")

    def __init__(self, site: Site, grafts: Sequence[Graft] = (), values: Mapping[str, Tensor] | None = None) -> None:
        self.site, self.grafts, self.values = site, tuple(grafts), values or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.grafts:
            return self.site.run(self.values, *args, **kwargs)
        inner, graft = Base(self.site, self.grafts[:-1], self.values), self.grafts[-1]
        if graft.parameter in self.values:  # whoever set it has read it through this graft
            return inner(*args, **kwargs)
        return graft.run(inner, *args, **kwargs)

    def read(self, parameter: str) -> Tensor:
        """A parameter as the grafts beneath leave it; matrices (out, in, ...)."""
        if parameter in self.values:
            return self.values[parameter]
        value = self.site.read(parameter)
        for graft in self.grafts:
            if graft.parameter == parameter:
                value = graft.weight(widened(value))
        return value

    def with_values(self, values: Mapping[str, Tensor]) -> Base:
        """The same, with some parameters replaced."""
        return Base(self.site, self.grafts, {**self.values, **values})

    def low_rank(
        self, x: Tensor, down: Down, up: Tensor, scale: float, *, dropped: Tensor | None = None, bias: bool = True
    ) -> Tensor:
        """`self(x) + scale * up (down x)` by the shared kernel where the base is a bare linear layer.

        Args:
            x: (..., in)
            down: (r, in), or a shard width
            up: (out, r)
            scale: of the update
            dropped: what the update sees instead of x, (..., in); x itself if None
            bias: False leaves the layer's bias out.
        """
        if self.site.is_linear and not self.grafts:
            weight, b = self.site.linear_parameters(self.values)
            b = b if bias else None
            if dropped is None:
                return low_rank_linear(x, weight, b, down, up, scale)
            return F.linear(x, weight, b) + low_rank_product(dropped, down, up, scale)
        y = self(x) if bias or self.site.module.bias is None else self(x) - self.read("bias").to(x.dtype)
        return y + low_rank_product(x if dropped is None else dropped, down, up, scale)


def widened(value: Tensor) -> Tensor:
    """In float32 at least: what a weight graft, whose parameters are float32, computes with."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first floating-point tensor among call arguments."""
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
