"""Grafts: the small trained modules that run around a site.

`Graft` may change the input, the output, or whether and how the base is called.  `WeightGraft` says what becomes of
a parameter, W -> weight(W), or of several (`maps`, `mapped`); merging uses that, and the suite holds any faster
`forward` equal to it.
`LowRankGraft` is a weight graft that only names its factors.

Parameters are float32 masters, whatever the base's dtype.  A plain graft is called with its parameters cast to the
dtype of what it works on.  A weight graft sees the masters, and `weight` a float32 matrix whose image the core rounds
once; a faster `forward` is written with the core's operations (`base.low_rank`, `rescale`), which cast inside.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pegbox.core.errors import SettingsError
from pegbox.core.low_rank import Down, as_matrix
from pegbox.core.site import Base, Site, first_tensor


class Graft(nn.Module):
    """Runs around a site.

    Attributes:
        maps: the parameters that a weight graft maps; a class says so, or a constructor where it depends on
            what the site has.
        broadcasts: its module may be called with one row that stands for all of a batch.
        sums: the changes of several at one site can be added.
        prepares: it changes nothing at its site, and makes ready what other grafts of its adapter read; in a sum, too,
            it runs whole.
    """

    any_layout: ClassVar[bool] = False  # whether a faster forward of a weight graft knows convolutions and lookups
    maps: tuple[str, ...] = ()  # not `parameters`, which a module has already
    broadcasts: ClassVar[bool] = False
    sums: ClassVar[bool] = True
    prepares: ClassVar[bool] = False

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} says nothing about forward")

    def weight(self, w: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is not a map of a parameter")

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        """One of the parameters of `maps` as this graft leaves it."""
        return self.weight(w)

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        """One graft that does for row i what `grafts[i]` would do alone, in one pass; None where there is none.

        Args:
            grafts: of each row of the batch, this class's among them, others' perhaps, and None for the base.
        """
        return None

    def rates(self) -> dict[str, float]:
        """Learning-rate multipliers, by name of an own parameter; 1 where not given."""
        return {}

    def born(self) -> dict[str, int]:
        """The optimizer step at which an own parameter began to train, by name; 0 where not given."""
        return {}

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Call forward with parameters in the dtype of the computation."""
        like = first_tensor((*args, *kwargs.values(), *base.site.module.parameters()))
        own = dict(self.named_parameters())
        if like is None or all(p.dtype == like.dtype for p in own.values()):
            return self(base, *args, **kwargs)
        cast = {name: p.to(like.dtype) for name, p in own.items()}
        return functional_call(self, cast, (base, *args), kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Graft:
        """Follow the base to a device, never to a dtype: masters stay float32."""

        def move(t: Tensor) -> Tensor:
            return t.to(fn(torch.empty(0, device=t.device)).device)

        return super()._apply(move, recurse)


class WeightGraft(Graft):
    """W -> weight(W), for a parameter of a site.  `forward` may be overridden by something faster.

    A graft that maps several names them in `maps`, and says what becomes of each in `mapped`.
    """

    maps: tuple[str, ...] = ("weight",)

    @abstractmethod
    def weight(self, w: Tensor) -> Tensor:
        """The parameter as this graft leaves it; a matrix is (out, in, ...)."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.through(self)(*args, **kwargs)

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self(base, *args, **kwargs)


class LowRankGraft(WeightGraft):
    """W + scale * up @ down, never materialised in the forward.  A subclass names the factors, and no more."""

    any_layout = True
    dropout: float = 0.0

    @abstractmethod
    def factors(self) -> tuple[Down, Tensor, float]:
        """down (r, in) or the width r of shards; up (out, r); scale."""

    def weight(self, w: Tensor) -> Tensor:
        down, up, scale = self.factors()
        return w + scale * (up @ as_matrix(down, w.shape[1], up))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        drops = self.training and self.dropout and x.is_floating_point()  # ids are not dropped
        dropped = nn.functional.dropout(x, self.dropout) if drops else None
        return base.low_rank(x, *self.factors(), dropped=dropped)


def check_rank(site: Site, rank: int) -> tuple[int, int]:
    """The shape (out, in) of a site's matrix.

    Raises:
        SettingsError: a rank above what such a matrix can have.
    """
    out, in_ = site.shape
    if rank > min(out, in_):
        raise SettingsError(f"rank must be 1..{min(out, in_)} at {site.path} (a {out} x {in_} weight), got {rank}")
    return out, in_


def low_rank_pair(site: Site, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) drawn uniform as in the code of LoRA's authors, and B (out, rank) of zeros.

    Raises:
        SettingsError: a rank above what the site's matrix can have.
    """
    out, in_ = check_rank(site, rank)
    a = nn.Parameter(torch.empty(rank, in_))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(out, rank))


class CopyGraft(Graft):
    """A trained copy of a whole module, a new classification head say; runs in the place of the original."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in module.named_parameters()}
        self.values = nn.ParameterDict({name.replace(".", "/"): p for name, p in copies.items()})

    def current(self) -> dict[str, Tensor]:
        """The copy, by the module's own parameter names."""
        return {name.replace("/", "."): value for name, value in self.values.items()}

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.site.run_whole(self.current(), *args, **kwargs)
