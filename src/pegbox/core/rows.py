"""A batch whose rows use different adapters: row i of every input and output belongs to adapter `rows[i]`.

Low-rank adapters share one pass of the base and one batched product over factors gathered per row.  Grafts that know
how to be one for all rows (`Graft.of_rows`) share one pass too.  Others run on their own rows, group by group, inside
the site.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.errors import CannotMix
from pegbox.core.graft import Graft, LowRankGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.parts import Assembled
from pegbox.core.site import Base, ModuleSite

Rows = tuple[str | None, ...]


def run_rows(site: ModuleSite, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The site's forward with an adapter per row.

    Raises:
        CannotMix: the batch has not len(rows) rows here, or a site's outputs cannot be put together again.
    """
    grafts = [site.grafts.get(name) if name is not None else None for name in rows]
    present = [graft for graft in grafts if graft is not None]
    if not present:
        return site.original(*args, **kwargs)
    rows = _of_tokens(rows, present, args, kwargs)
    used = [site.grafts.get(name) if name is not None else None for name in rows]
    _check_rows(site, rows, args, kwargs, present)
    if site.is_linear and not site.rounds_inputs and not kwargs and all(_is_plain_product(g) for g in present):
        return _low_rank_rows(site, used, args[0])  # type: ignore[arg-type]
    together = type(present[0]).of_rows(used)
    if together is not None:
        return Base(site, (together,))(*args, **kwargs)
    return _grouped_rows(site, rows, used, args, kwargs)


def _of_tokens(rows: Rows, present: list[Graft], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    """The adapter of each token, where a module of experts is called with the tokens of all rows, row by row."""
    if not all(isinstance(graft, Assembled) and graft.of_experts for graft in present):
        return rows
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    each = 1 if first is None else first.shape[0] // len(rows)
    return tuple(name for name in rows for _ in range(each)) if each else rows


def guard_experts(model: nn.Module, sites: Mapping[str, ModuleSite], rows: Rows) -> Callable[[], None]:
    """Count the model's own rows where only experts have adapters, which see tokens alone; gives what ends that."""
    grafts = [graft for site in sites.values() for graft in site.grafts.values()]
    if not any(isinstance(graft, Assembled) and graft.of_experts for graft in grafts):
        return lambda: None

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
        if first is not None and first.shape[0] != len(rows):
            raise CannotMix(
                f"{len(rows)} rows were given adapters, but the model was called with {first.shape[0]} rows"
            )

    return model.register_forward_pre_hook(count, with_kwargs=True).remove


def _is_plain_product(graft: Graft) -> bool:
    """Whether a graft only adds the product of its factors; while it drops inputs it does not."""
    return isinstance(graft, LowRankGraft) and not (graft.training and graft.dropout)


def _check_rows(
    site: ModuleSite, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any], present: list[Graft]
) -> None:
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    if first is not None and first.shape[0] == 1 and all(g.broadcasts for g in present):
        return
    if first is None or first.shape[0] != len(rows):
        got = "no tensor" if first is None else f"{first.shape[0]} rows"
        raise CannotMix(f"{len(rows)} rows were given adapters, but {site.path or 'the model'} was called with {got}")


def _low_rank_rows(site: ModuleSite, used: list[LowRankGraft | None], x: Tensor) -> Tensor:
    """x: (B, ..., in) -> (B, ..., out)."""
    down, up = _gathered(site, used, x)  # (B, r, in), (B, r, out)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, t, in)
    h = torch.bmm(rows, down.transpose(1, 2))  # (B, t, r)
    y = site.linear(rows, {})  # (B, t, out)
    y = torch.baddbmm(y, h, up) if torch.is_grad_enabled() else y.baddbmm_(h, up)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _gathered(site: ModuleSite, used: list[LowRankGraft | None], x: Tensor) -> tuple[Tensor, Tensor]:
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


def _grouped_rows(
    site: ModuleSite, rows: Rows, used: list[Graft | None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Each graft on its own rows, the results put back in place."""
    if len(set(used)) == 1:
        return Base(site, [graft for graft in used[:1] if graft is not None])(*args, **kwargs)
    _refuse_cache(site, kwargs)
    outputs, places = [], []
    before, given = site.context.rows, site.context.given
    try:
        for graft in dict.fromkeys(used):
            index = [i for i, g in enumerate(used) if g is graft]
            place = torch.tensor(index)
            some_args, some_kwargs = _take((args, kwargs), place, len(used))
            site.context.rows = tuple(rows[i] for i in index)  # for the sites inside this module
            site.context.given = _take(given, place, len(used))
            outputs.append(Base(site, () if graft is None else (graft,))(*some_args, **some_kwargs))
            places.append(place)
    finally:
        site.context.rows, site.context.given = before, given
    order = torch.argsort(torch.cat(places))
    return _join(site, outputs, order, [len(place) for place in places])


def _refuse_cache(site: ModuleSite, kwargs: Mapping[str, Any]) -> None:
    """Groups of rows cannot write to one key-value cache in turn."""
    if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
        raise CannotMix(
            f"rows of {site.path or 'the model'} run in groups, one for each adapter, which cannot share a key-value "
            "cache; pass use_cache=False, or generate for one adapter at a time"
        )


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


def _join(site: ModuleSite, outputs: list[Any], order: Tensor, sizes: list[int]) -> Any:
    """Outputs of several groups of rows, concatenated and put in the order of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if any(not o.ndim or o.shape[0] != size for o, size in zip(outputs, sizes, strict=True)):
            return _shared(site, outputs)
        if len({o.shape[1:] for o in outputs}) > 1:
            raise CannotMix(f"rows of {site.path or 'the model'} differ in shape: {[tuple(o.shape) for o in outputs]}")
        return torch.cat(outputs)[order.to(first.device)]
    if isinstance(first, Mapping):
        if any(o.keys() != first.keys() for o in outputs):
            strange = sorted(set().union(*outputs) - set.intersection(*map(set, outputs)))
            raise CannotMix(f"rows of {site.path or 'the model'} give different outputs: {strange[0]!r} for some only")
        joined = {k: _join(site, [o[k] for o in outputs], order, sizes) for k in first}
        return type(first)(**joined) if dataclasses.is_dataclass(first) else joined
    if isinstance(first, tuple):
        return tuple(_join(site, list(parts), order, sizes) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotMix(
        f"{site.path or 'the model'} returns {type(first).__name__}, which cannot be split by rows; "
        "where that is a cache, pass use_cache=False"
    )


def _shared(site: ModuleSite, outputs: list[Tensor]) -> Tensor:
    """What is not by rows and is the same for every group: T5's position bias."""
    if all(o.shape == outputs[0].shape and torch.equal(o, outputs[0]) for o in outputs):
        return outputs[0]
    shapes = [tuple(o.shape) for o in outputs]
    raise CannotMix(
        f"{site.path or 'the model'} gives each adapter's rows a tensor of their own, of shapes {shapes}, which has no "
        "rows to put together; where that is a loss, leave labels out and compute it from the logits"
    )
