"""A batch whose rows use different adapters: row i of every input and output belongs to adapter `rows[i]`.

Low-rank adapters share one pass of the base and one batched product over factors gathered per row.  Others run on
their own rows, group by group, inside the site.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pegbox.core.errors import CannotMix
from pegbox.core.graft import Graft, LowRankGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.site import Base, Site

Rows = tuple[str | None, ...]


def run_rows(site: Site, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The site's forward with an adapter per row.

    Raises:
        CannotMix: the batch has not len(rows) rows here, or a site's outputs cannot be put together again.
    """
    used = [site.grafts.get(name) if name is not None else None for name in rows]
    present = [graft for graft in used if graft is not None]
    if not present:
        return site.original(*args, **kwargs)
    _check_rows(site, rows, args, kwargs)
    if site.is_linear and not kwargs and all(_is_plain_product(g) for g in present):
        return _low_rank_rows(site, used, args[0])  # type: ignore[arg-type]
    return _grouped_rows(site, used, args, kwargs)


def _is_plain_product(graft: Graft) -> bool:
    """Whether a graft only adds the product of its factors; while it drops inputs it does not."""
    return isinstance(graft, LowRankGraft) and not (graft.training and graft.dropout)


def _check_rows(site: Site, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    if first is None or first.shape[0] != len(rows):
        got = "no tensor" if first is None else f"{first.shape[0]} rows"
        raise CannotMix(f"{len(rows)} rows were given adapters, but {site.path or 'the model'} was called with {got}")


def _low_rank_rows(site: Site, used: list[LowRankGraft | None], x: Tensor) -> Tensor:
    """x: (B, ..., in) -> (B, ..., out)."""
    weight, bias = site.linear_parameters({})
    down, up = _gathered(site, used, x)  # (B, r, in), (B, r, out)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, t, in)
    h = torch.bmm(rows, down.transpose(1, 2))  # (B, t, r)
    y = F.linear(rows, weight, bias)  # (B, t, out)
    y = torch.baddbmm(y, h, up) if torch.is_grad_enabled() else y.baddbmm_(h, up)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _gathered(site: Site, used: list[LowRankGraft | None], x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors by row, the scale folded in, ranks padded with zeros to the largest; kept while nothing changes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _gather(used, x)
    kept = site.gathered
    if kept is None or not kept.fits(used, x):
        parameters = [p for g in set(used) if g is not None for p in g.parameters()]
        kept = site.gathered = Gathered(tuple(used), x.dtype, [(p, p._version) for p in parameters], _gather(used, x))
    return kept.factors


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Factors by row, and what they were gathered from."""

    used: tuple[LowRankGraft | None, ...]
    dtype: torch.dtype
    versions: list[tuple[Tensor, int]]
    factors: tuple[Tensor, Tensor]

    def fits(self, used: list[LowRankGraft | None], x: Tensor) -> bool:
        """Whether they are still those of `used`."""
        same = self.dtype == x.dtype and all(map(operator.is_, self.used, used)) and len(self.used) == len(used)
        return same and all(p._version == version for p, version in self.versions)


def _gather(used: list[LowRankGraft | None], x: Tensor) -> tuple[Tensor, Tensor]:
    distinct = list(dict.fromkeys(g for g in used if g is not None))
    factors = []
    for graft in distinct:
        down, up, scale = graft.factors()
        factors.append((as_matrix(down, x.shape[-1], up), scale * up.T))
    rank = max(len(up) for _, up in factors)
    downs = [F.pad(down, (0, 0, 0, rank - down.shape[0])).to(x.dtype) for down, _ in factors]
    ups = [F.pad(up, (0, 0, 0, rank - len(up))).to(x.dtype) for _, up in factors]
    if any(g is None for g in used):
        downs.append(torch.zeros_like(downs[0]))
        ups.append(torch.zeros_like(ups[0]))
    index = torch.tensor([distinct.index(g) if g is not None else len(distinct) for g in used], device=x.device)
    return torch.stack(downs)[index], torch.stack(ups)[index]


def _grouped_rows(site: Site, used: list[Graft | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each graft on its own rows, the results put back in place."""
    outputs, places = [], []
    rows = site.context.rows
    assert rows is not None
    try:
        for graft in dict.fromkeys(used):
            index = [i for i, g in enumerate(used) if g is graft]
            place = torch.tensor(index)
            some_args, some_kwargs = _take((args, kwargs), place, len(used))
            site.context.rows = tuple(rows[i] for i in index)  # for the sites inside this module
            outputs.append(Base(site, () if graft is None else (graft,))(*some_args, **some_kwargs))
            places.append(place)
    finally:
        site.context.rows = rows
    order = torch.argsort(torch.cat(places))
    return _join(site, outputs, order)


def _take(value: Any, index: Tensor, batch: int) -> Any:
    return _map(value, lambda t: t[index.to(t.device)] if t.ndim and t.shape[0] == batch else t)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _map(v, change) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and not dataclasses.is_dataclass(value):
        return type(value)(_map(v, change) for v in value)
    return value


def _join(site: Site, outputs: list[Any], order: Tensor) -> Any:
    """Outputs of several groups of rows, concatenated and put in the order of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if len({o.shape[1:] for o in outputs}) > 1:
            raise CannotMix(f"rows of {site.path or 'the model'} differ in shape: {[tuple(o.shape) for o in outputs]}")
        return torch.cat(outputs)[order.to(first.device)]
    if isinstance(first, Mapping):
        joined = {k: _join(site, [o[k] for o in outputs], order) for k in first}
        return type(first)(**joined) if dataclasses.is_dataclass(first) else joined
    if isinstance(first, tuple):
        return tuple(_join(site, list(parts), order) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotMix(
        f"{site.path or 'the model'} returns {type(first).__name__}, which cannot be split by rows; "
        "where that is a cache, pass use_cache=False"
    )
