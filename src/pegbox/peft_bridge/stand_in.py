"""What a tuner layer of PEFT's takes for the module that it wraps.

PEFT's layers ask their base layer's class, read its weight, and call it.  A stand-in is of the module's class, reads
its parameters as the grafts beneath leave them, and passes a call on to them; it owns nothing.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pegbox.core import Base, storage
from pegbox.core.site import ModuleSite

UNPADDED = (0, 0, 0)
SCALE = "embed_scale"  # what PEFT's layers multiply by at an embedding that has it


class Beneath(Protocol):
    """What a stand-in stands for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def kept(self, parameter: str) -> Tensor:
        """A parameter in the layout of the module."""


class Under:
    """What lies beneath a graft."""

    def __init__(self, base: Base, dtype: torch.dtype | None = None) -> None:
        self.base, self.dtype = base, dtype  # of the inputs, in which a quantised matrix is decoded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def kept(self, parameter: str) -> Tensor:
        """The module's own where no graft beneath maps it and it is plain numbers, else in its layout and dtype."""
        base = self.base
        mapped = parameter in base.values or any(parameter in graft.maps for graft in base.grafts)
        quantised = storage.name(base.site.module, parameter) is not None
        if mapped or quantised:
            return base.site.stored(parameter, base.read(parameter), self.dtype if quantised else None)
        own: Tensor = getattr(base.site.module, parameter)
        return own


class StandIn(nn.Module):
    """In the place of a site's module, inside a tuner layer."""

    site: ModuleSite
    beneath: Beneath | None

    @property
    def weight(self) -> Any:
        return self._parameter("weight")

    @property
    def bias(self) -> Any:
        return self._parameter("bias")

    def _parameter(self, name: str) -> Any:
        own = getattr(self.site.module, name)
        if not isinstance(own, Tensor):
            return own
        return storage.decoded(self.site.module, name) if self.beneath is None else self.beneath.kept(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if pads_otherwise(self.site.module):
            args = (unpadded(self.site.module, args[0]), *args[1:])
        if self.beneath is None:
            return self.site.original(*args, **kwargs)
        return self.beneath(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "site":
                raise
            return getattr(self.site.module, name)


def stand_in(site: ModuleSite) -> StandIn:
    """One for a site; `isinstance` takes it for the site's module, or for a plain linear if that is quantised."""
    kind: Any = type(site.module) if site.quantised is None else nn.Linear
    cls = _class(kind)
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.__dict__.update(site=site, beneath=None)
    if pads_otherwise(site.module):
        made.__dict__.update(padding=UNPADDED[: len(site.module.kernel_size)], padding_mode="zeros")
    scale = row_scale(site)
    if scale not in (None, 1.0) and not hasattr(site.module, SCALE):
        made.__dict__[SCALE] = scale
    return made


def pads_otherwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether it is a convolution that pads with other than zeros, of which PEFT's layers know nothing."""
    return isinstance(module, _ConvNd) and module.padding_mode != "zeros"


def padded(module: _ConvNd, x: Tensor) -> Tensor:
    return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)


def unpadded(module: _ConvNd, x: Tensor) -> Tensor:
    return F.pad(x, [-n for n in module._reversed_padding_repeated_twice])


@torch.no_grad()
def row_scale(site: ModuleSite) -> float | None:
    """c, where the site is an embedding that gives c times the rows of its table; None where it does not.

    Gemma's has it as an attribute, by which PEFT's layers go; others do it in their forward.
    """
    module = site.module
    if not isinstance(module, nn.Embedding) or site.adds_products:
        return 1.0
    rows = torch.arange(1.0, 3.0 + (module.padding_idx or 0), dtype=torch.float32, device=module.weight.device)
    table = rows[:, None].expand(-1, module.embedding_dim).to(module.weight.dtype)
    y = site.run_whole({"weight": table}, torch.arange(len(table), device=table.device)[None])[0]
    scales = y / table
    return float(scales[0, 0]) if torch.equal(scales, scales[0, 0].expand_as(scales)) else None


class Decoded(nn.Linear):
    """A quantised linear as a plain one, while PEFT makes its layers; the matrix is decoded whenever it is read."""

    def __init__(self, module: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.bias = module.bias
        self.of = (module,)  # not this one's own

    @property
    def weight(self) -> Any:  # type: ignore[override]
        (module,) = self.of
        value = storage.decoded(module, "weight").to(storage.dtype(module, "weight"))
        return nn.Parameter(value, requires_grad=False)


@functools.cache
def _class(kind: type[nn.Module]) -> type[StandIn]:
    return type(f"StandInFor{kind.__name__}", (StandIn, kind), {})
