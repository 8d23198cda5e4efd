"""Sites: what a method builds grafts for, and what grafts run around.

A `ModuleSite` is a module of the base, by its path; grafts run around it as middleware around a handler: it takes the
place of the module's `forward`, and each graft is called with a `Base` that stands for everything beneath it.  A
`Part` (parts.py) is a matrix that is not a whole module's `weight`.  Both read every matrix as (out, in), decoded
where it is kept quantised: how modules keep their matrices is in layout.py and storage.py.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from pegbox.core import storage
from pegbox.core.context import Context
from pegbox.core.errors import SettingsError
from pegbox.core.layout import Layout, computes_plainly, is_linear, layout_of
from pegbox.core.low_rank import Down, Matrix, as_matrix, linear, low_rank_linear, low_rank_product

if TYPE_CHECKING:
    from pegbox.core.graft import Graft
    from pegbox.core.rows import Gathered


class Site(ABC):
    """A matrix of the base, or a module: what a method is given to build a graft for.

    Attributes:
        path: of the module, or of the matrix (`h.0.attn.c_attn[q]`).
        module: the module that holds it.
        context: shared by every site of a tuned model.
    """

    path: str
    module: nn.Module
    context: Context

    @property
    @abstractmethod
    def grafts(self) -> dict[str, Graft]:
        """By adapter."""

    @property
    @abstractmethod
    def chain(self) -> tuple[Graft, ...]:
        """The grafts in use here, innermost first."""

    @abstractmethod
    def read(self, parameter: str) -> Tensor:
        """A parameter; a matrix as (out, in), decoded if it is kept quantised."""

    @abstractmethod
    def has(self, parameter: str) -> bool:
        """Whether there is such a parameter."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""

    @property
    @abstractmethod
    def quantised(self) -> str | None:
        """How the weight is kept, `nf4` say; None where it is plain numbers."""

    @property
    def module_path(self) -> str:
        """Path of the module around which the grafts run."""
        return self.path

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


class ModuleSite(Site):
    """One module of the base, and the grafts that run around it.

    A parameter may be a child's, by its dotted name (`out_proj.weight`).
    """

    def __init__(self, path: str, module: nn.Module, context: Context) -> None:
        self.path, self.module, self.context = path, module, context
        self._grafts: dict[str, Graft] = {}
        self._chain: tuple[Graft, ...] = ()
        self.gathered: Gathered | None = None  # factors by row, kept by rows.py
        self.original = module.forward
        self._patched_before = module.__dict__.get("forward")  # another library's patch, to put back
        self._bare = _Bare(module, module.forward)
        self._layouts: dict[str, Layout] = {}
        self._computes_plainly = computes_plainly(module)
        self.maps_features = not self.has("weight") or self.layout("weight").features_last
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
        if self.context.called is not None:
            self.context.called.add(self.path)
        if self.context.bare:
            return self.original(*args, **kwargs)
        if self.context.rows is not None:
            from pegbox.core.rows import run_rows

            return run_rows(self, self.context.rows, args, kwargs)
        return Base(self, self._chain)(*args, **kwargs)

    def release(self) -> None:
        """Give the module its own forward back."""
        if self._guard is not None:
            self._guard.remove()
        if self._patched_before is None:
            del self.module.forward
        else:
            self.module.forward = self._patched_before

    @property
    def grafts(self) -> dict[str, Graft]:
        return self._grafts

    @property
    def chain(self) -> tuple[Graft, ...]:
        return self._chain

    @chain.setter
    def chain(self, grafts: tuple[Graft, ...]) -> None:
        self._chain = grafts

    # -- what it holds -------------------------------------------------------------------------------------------

    def locate(self, parameter: str) -> tuple[nn.Module, str]:
        """The module that keeps a parameter, and its name there."""
        path, _, leaf = parameter.rpartition(".")
        return (self.module.get_submodule(path) if path else self.module), leaf

    def layout(self, parameter: str) -> Layout:
        """How a parameter is kept."""
        if parameter not in self._layouts:
            self._layouts[parameter] = layout_of(*self.locate(parameter))
        return self._layouts[parameter]

    @property
    def shape(self) -> tuple[int, int]:
        out, in_ = self.shape_of("weight")
        return out, in_

    def shape_of(self, parameter: str) -> torch.Size:
        """As `read` gives it; decodes nothing."""
        kept = storage.shape(*self.locate(parameter))
        return self.layout(parameter).read(torch.empty(kept, device="meta")).shape

    @property
    def quantised(self) -> str | None:
        return storage.name(self.module, "weight") if self.has("weight") else None

    def read(self, parameter: str) -> Tensor:
        if self.context.called is not None:
            self.context.called.add(self.path)
        return self.layout(parameter).read(storage.decoded(*self.locate(parameter)))

    def has(self, parameter: str) -> bool:
        module, leaf = self.locate(parameter)
        return isinstance(getattr(module, leaf, None), Tensor)

    def stored(self, parameter: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`value`, oriented as `read` gives it, as the module keeps it, or would if it were not quantised.

        Args:
            dtype: instead of that of the parameter.
        """
        module, leaf = self.locate(parameter)
        turned = self.layout(parameter).stored(value, storage.shape(module, leaf))
        return turned.to(dtype or storage.dtype(module, leaf)).contiguous()

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The bare module with other parameters, given as `read` gives them."""
        if not values:
            return self.original(*args, **kwargs)
        if self.is_linear and len(args) == 1 and not kwargs:
            return self.linear(args[0], values)
        return self.run_whole({name: self.stored(name, value) for name, value in values.items()}, *args, **kwargs)

    def run_whole(self, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The bare module with other parameters, its children's too, by dotted name and in the module's own layout."""
        return functional_call(self._bare, {f"module.{name}": v for name, v in parameters.items()}, args, kwargs)

    def linear(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """A linear site's output, with other parameters."""
        weight, bias = self._parameters_for(x, values)
        return self._computed(x, lambda x: linear(x, weight, bias))

    def low_rank(
        self,
        values: Mapping[str, Tensor],
        x: Tensor,
        down: Down,
        up: Tensor,
        scale: float,
        dropped: Tensor | None,
        bias: bool,
        gate: Tensor | None,
    ) -> Tensor:
        """A linear site's output with other parameters and a low-rank update; see `Base.low_rank`."""
        weight, b = self._parameters_for(x, values)
        b = b if bias else None
        if dropped is None:
            return self._computed(x, lambda x: low_rank_linear(x, weight, b, down, up, scale, gate))
        return self._computed(x, lambda x: linear(x, weight, b)) + low_rank_product(dropped, down, up, scale, gate)

    def _parameters_for(self, x: Tensor, values: Mapping[str, Tensor]) -> tuple[Matrix, Tensor | None]:
        """As `linear_parameters`; what takes the place of a quantised weight, in the dtype that it meets."""
        weight, bias = self.linear_parameters(values)
        if isinstance(weight, Tensor) and self.quantised is not None:
            weight = weight.to(storage.compute_dtype(self.module) or x.dtype)
        return weight, bias

    def _computed(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """In the dtype that a quantised module computes in; as it comes elsewhere."""
        dtype = storage.compute_dtype(self.module)
        return compute(x) if dtype in (None, x.dtype) else compute(x.to(dtype)).to(x.dtype)

    @property
    def is_linear(self) -> bool:
        """Whether the module computes exactly `F.linear(x, weight, bias)` from a plain tensor.

        Not so where another library has patched its forward, to bring its weights from elsewhere say.
        """
        return self._patched_before is None and is_linear(self.module) and self._knows_matrix

    @property
    def rounds_inputs(self) -> bool:
        """Whether the bare module does not compute the product with its decoded matrix."""
        return storage.rounds_inputs(self.module)

    @property
    def adds_products(self) -> bool:
        """Whether a change of the matrix changes the output as its layout says."""
        return self._patched_before is not None or self._knows_matrix

    @property
    def _knows_matrix(self) -> bool:
        return self._computes_plainly or storage.name(self.module, "weight") is not None

    def linear_parameters(self, values: Mapping[str, Tensor]) -> tuple[Matrix, Tensor | None]:
        """Weight (out, in) and bias (out,) of a linear site, in the dtype the module keeps.

        A quantised weight is what decodes it.
        """
        weight: Matrix = storage.matrix(self.module, "weight")
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        if "weight" in values:
            weight = values["weight"].to(storage.dtype(self.module, "weight"))
        elif isinstance(weight, Tensor):
            weight = self.layout("weight").read(weight)
        if "bias" in values and bias is not None:
            bias = values["bias"].to(bias.dtype)
        return weight, bias


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

    def __init__(
        self, site: ModuleSite, grafts: Sequence[Graft] = (), values: Mapping[str, Tensor] | None = None
    ) -> None:
        self.site, self.grafts, self.values = site, tuple(grafts), values or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.grafts:
            return self.site.run(self.values, *args, **kwargs)
        inner, graft = Base(self.site, self.grafts[:-1], self.values), self.grafts[-1]
        if graft.maps and not inner.takes_faster(graft, args, kwargs):
            return inner.through(graft)(*args, **kwargs)
        return graft.run(inner, *args, **kwargs)

    def takes_faster(self, graft: Graft, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a weight graft's own forward does here: one input, on a layout it knows, nothing set already."""
        known = graft.any_layout or (self.site.maps_features and not self.site.rounds_inputs)
        return known and len(args) == 1 and not kwargs and not any(p in self.values for p in graft.maps)

    def through(self, graft: Graft) -> Base:
        """The same, with every parameter that `graft` maps replaced by its image.

        One that is set already is left: whoever set it has read it through that graft.
        """
        left = [parameter for parameter in graft.maps if parameter not in self.values]
        return self.with_values({p: graft.mapped(p, widened(self.read(p))) for p in left})

    def read(self, parameter: str) -> Tensor:
        """A parameter as the grafts beneath leave it; a matrix as (out, in)."""
        if parameter in self.values:
            return self.values[parameter]
        value = self.site.read(parameter)
        for graft in self.grafts:
            if parameter in graft.maps:
                value = graft.mapped(parameter, widened(value))
        return value

    def with_values(self, values: Mapping[str, Tensor]) -> Base:
        """The same, with some parameters replaced."""
        return Base(self.site, self.grafts, {**self.values, **values})

    def low_rank(
        self,
        x: Tensor,
        down: Down,
        up: Tensor,
        scale: float,
        *,
        dropped: Tensor | None = None,
        bias: bool = True,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The module's output for x with `scale * up @ down` added to its matrix.

        That is `self(x) + scale * up (down x)` by the shared kernel where the base is a bare linear layer, two thin
        convolutions or a lookup in `down` where it is one of those, and the sum itself where nothing is known of what
        the module does with its matrix.

        Args:
            x: (..., in), or what the module is called with
            down: (r, in), or a shard width
            up: (out, r)
            scale: of the update
            dropped: what the update sees instead of x; x itself if None
            bias: False leaves a linear layer's bias out.
            gate: (..., r), how much of each direction a row of x gets, at linear layers; all of it if None

        Raises:
            SettingsError: dropout or a gate, where only the sum will do.
        """
        if self.site.is_linear and not self.grafts:
            return self.site.low_rank(self.values, x, down, up, scale, dropped, bias, gate)
        if self.site.adds_products:
            y = self(x) if bias or not self.site.has("bias") else self(x) - self.read("bias").to(x.dtype)
            seen = x if dropped is None else dropped
            if gate is not None:
                return y + low_rank_product(seen, down, up, scale, gate)
            return y + self.site.layout("weight").product(self.site.module, seen, down, up, scale)
        name = type(self.site.module).__name__
        if gate is not None:
            raise SettingsError(f"no experts at {self.site.path}: {name} does not say what it does with inputs")
        if dropped is not None:
            raise SettingsError(f"dropout must be 0 at {self.site.path}: {name} does not say what it does with inputs")
        w = widened(self.read("weight"))
        return self.with_values({"weight": w + scale * (up @ as_matrix(down, w.shape[1], up))})(x)


def widened(value: Tensor) -> Tensor:
    """In float32 at least: what a weight graft, whose parameters are float32, computes with."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first floating-point tensor among call arguments."""
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
