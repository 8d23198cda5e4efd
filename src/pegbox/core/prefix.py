"""The seam for virtual keys and values: pairs that every query of a layer meets before those of the text.

    softmax(s q [P_k, K]^T) [P_v, V]        P_k, P_v: (n, width)   K, V: (T, width)   q: (T, width)

An attention that takes a key-value cache is given one that puts the pairs before all that it returns; the cache of a
generation keeps the text alone.  Any other attention gets n positions more at the start, where what its key and value
projections give is replaced, and its outputs there are cut off.  Masks are extended, so that every query sees the
pairs.  The text's positions move on by n, as if the pairs were those of n tokens read before it.  Relative positions
(T5) follow from the number of keys; patches of an image stay where they are.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import AdapterError, CannotMix, ModelError, TargetError
from pegbox.core.graft import Graft
from pegbox.core.layout import is_conv1d
from pegbox.core.method import Anatomy
from pegbox.core.site import Base, Site
from pegbox.core.tokens import OpeningGraft, alike, right_aligned, text_positions

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # what attentions call their cache
MASKS = ("attention_mask", "mask")
DISTANCES = ("relative_position_bias_table", "relative_position_bias", "max_relative_positions")
CROSSED = ("key_value_states", "encoder_hidden_states")


@dataclass(frozen=True)
class Place:
    """One attention that gets pairs.

    Attributes:
        index: which of the pairs are its own, counted from 0.
        heads: of keys and values; 1 where no cache asks for them apart.
        width: of the keys, as of the values: heads times their dimension.
        start: keys and values of the places before it, put side by side, are so wide.
        names: parameters of its forward.
        cache, mask: two of them, where it has such.
        causal: a query sees no later key where no mask says so.
        relative: what a query sees of the pairs depends on how far they are from it.
        layer: where its keys lie in a cache.
        config: says which kernel computes it, if there is one.
    """

    path: str
    index: int
    heads: int
    width: int
    start: int
    names: tuple[str, ...]
    cache: str | None
    mask: str | None
    causal: bool
    relative: bool
    layer: int
    config: Any


@dataclass(frozen=True)
class Survey:
    """Where the grafts of a prefix go.

    Attributes:
        places: attentions by path.
        projections: path of a projection -> its attention, and 0 for keys or 1 for values; of those without a cache.
        position: the module that gives the text its positions: a table, or '' for the model; None if nothing does.
    """

    places: dict[str, Place]
    projections: dict[str, tuple[Place, int]]
    position: str | None

    @property
    def paths(self) -> list[str]:
        """All of them."""
        return [*(() if self.position is None else (self.position,)), *self.places, *self.projections]


def survey(model: nn.Module, anatomy: Anatomy, attentions: Sequence[str]) -> Survey:
    """What there is to know of some attentions before they get pairs.

    Raises:
        TargetError: one of them is of a kind that cannot get any.
    """
    keys = {side: _projections(anatomy, side, attentions) for side in ("attn", "cross")}
    pairs = keys["attn"] | {path: found for path, found in keys["cross"].items() if path not in keys["attn"]}
    places: dict[str, Place] = {}
    projections: dict[str, tuple[Place, int]] = {}
    start, tables = 0, _tables(anatomy)
    relative = any(path.startswith(f"{block}.") for path in tables for block in anatomy.blocks)
    for path in attentions:
        place = places[path] = _place(model, path, pairs.get(path, ()), len(places), start, relative)
        start += 2 * place.width
        if place.cache is None:
            projections |= _without_cache(model, place, pairs.get(path, ()))
    return Survey(places, projections, _position(model, anatomy, tables, attentions))


def _tables(anatomy: Anatomy) -> list[str]:
    """Modules that hold positions, or distances in the blocks."""
    try:
        return anatomy.role("embed.position")
    except TargetError:
        return []


def _projections(anatomy: Anatomy, side: str, attentions: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Path of an attention -> those of its key and its value projection, where it has them apart."""
    try:
        pairs = list(zip(anatomy.role(f"{side}.k"), anatomy.role(f"{side}.v"), strict=True))
    except (TargetError, ValueError):
        return {}
    return {path: pair for path in attentions for pair in pairs if pair[0].startswith(f"{path}.")}


def _place(model: nn.Module, path: str, pair: Sequence[str], index: int, start: int, relative: bool) -> Place:
    module = model.get_submodule(path)
    names = tuple(inspect.signature(module.forward).parameters)
    config = _told(module, "config", object) or getattr(model, "config", None)
    cache = next((name for name in CACHES if name in names), None)
    return Place(
        path=path,
        index=index,
        heads=1 if cache is None else key_shape(config)[0],
        width=_width(model, config, pair),
        start=start,
        names=names,
        cache=cache,
        mask=next((name for name in MASKS if name in names), None),
        causal=_told(module, "is_causal", bool) or False,
        relative=relative,
        layer=_told(module, "layer_idx", int) or 0,
        config=config,
    )


def _told(module: nn.Module, name: str, kind: type) -> Any:
    """What an attention, or the first part of it that says anything, says of itself."""
    said = (getattr(part, name, None) for part in module.modules())
    return next((value for value in said if value is not None and isinstance(value, kind)), None)


def _width(model: nn.Module, config: Any, pair: Sequence[str]) -> int:
    if pair:
        projection: Any = model.get_submodule(pair[0])
        return int(projection.nf if is_conv1d(projection) else projection.out_features)
    heads, dim = key_shape(config)
    return heads * dim


def key_shape(config: Any) -> tuple[int, int]:
    """Heads of the keys, and the dimension of one, by the config of a transformer.

    Raises:
        TargetError: the config, or None, does not tell.
    """
    heads: int | None = getattr(config, "num_attention_heads", None)
    if not heads:
        raise TargetError("the model's config does not tell how many attention heads it has, so it takes no prefix")
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, dim


def prefix_peft(model: nn.Module) -> dict[str, Any]:
    """What HF PEFT's configuration of a prefix says of the model."""
    config: Any = getattr(model, "config", None)
    heads, dim = key_shape(config)
    return {
        "token_dim": heads * dim,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def in_every_layer(model: nn.Module, found: Survey) -> bool:
    """Whether there are pairs in every layer of the model, by way of a cache, as HF PEFT has them."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return len(found.places) == layers and all(place.cache for place in found.places.values())


def by_layer(given: Tensor, own: Mapping[str, Tensor], *, shared: bool) -> dict[str, Tensor]:
    """HF PEFT's prefix as one of each layer's own.

    Args:
        given: (n, 2 L width): keys and values of layer 0, of layer 1, and so on.
        own: (n, 2, width) of each layer, by name.
        shared: it is an encoder-decoder's, whose layer i has the vectors 4i and 4i + 1, counted in a circle.

    Raises:
        AdapterError: there are more or fewer numbers than the layers have.
    """
    if given.ndim != 2 or given.numel() != sum(map(torch.numel, own.values())):
        raise AdapterError(f"a prefix of shape {tuple(given.shape)} does not fit {len(own)} layers")
    if not shared:
        parts = given.split([2 * mine.shape[2] for mine in own.values()], dim=1)
        return {name: part.unflatten(1, (2, -1)) for name, part in zip(own, parts, strict=True)}
    vectors = given.unflatten(1, (2 * len(own), -1))
    ends = [4 * i % vectors.shape[1] for i in range(len(own))]
    return {name: vectors[:, end : end + 2] for name, end in zip(own, ends, strict=True)}


def _without_cache(model: nn.Module, place: Place, pair: Sequence[str]) -> dict[str, tuple[Place, int]]:
    if not pair:
        raise TargetError(
            f"{place.path} takes no key-value cache and has no key and value projection of its own, so it cannot be "
            "given more keys"
        )
    if "position_embeddings" in place.names:
        raise TargetError(f"{place.path} rotates its keys and takes no key-value cache, so it cannot be given more")
    if any(_told(model.get_submodule(place.path), name, object) is not None for name in DISTANCES):
        raise TargetError(f"{place.path} has a bias for each pair of its places, so it cannot be given more keys")
    return {path: (place, part) for part, path in enumerate(pair)}


def _position(model: nn.Module, anatomy: Anatomy, tables: Sequence[str], attentions: Sequence[str]) -> str | None:
    """A plain table of positions beside the tokens' own table; else the model, where it takes `position_ids`."""
    embeds = [path for path in anatomy.role("embed") if isinstance(model.get_submodule(path), nn.Embedding)]
    beside = {_parent(path) for path in embeds}
    for path in tables:
        plain = type(model.get_submodule(path)) is nn.Embedding and _parent(path) in beside
        tower = _parent(_parent(path))
        if plain and any(attention.startswith(tower) for attention in attentions):
            return path
    return "" if "position_ids" in inspect.signature(model.forward).parameters else None


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


class Pairs(nn.Module):
    """What the grafts of one adapter share: how many pairs, and what they are.

    Args:
        found: where they go.
        count: how many a layer.
    """

    def __init__(self, found: Survey, count: int) -> None:
        super().__init__()
        self.survey, self.count = found, count

    @abstractmethod
    def of(self, place: Place) -> Tensor:
        """Keys and values of one attention: (n, 2, width)."""

    def pair(self, place: Place) -> tuple[Tensor, Tensor]:
        """The same by head: (heads, n, dim) each."""
        keys, values = self.of(place).unbind(1)
        return _by_head(keys, place.heads), _by_head(values, place.heads)


def _by_head(vectors: Tensor, heads: int) -> Tensor:
    return vectors.unflatten(1, (heads, -1)).transpose(0, 1)


def prefix_graft(site: Site, pairs: Pairs) -> Graft:
    """What runs around one of the paths of a survey."""
    found = pairs.survey
    if site.path in found.projections:
        return SwapGraft(pairs, *found.projections[site.path])
    if site.path in found.places:
        place = found.places[site.path]
        return RoomGraft(pairs, place) if place.cache is None else PairGraft(pairs, place)
    return TableGraft(pairs) if isinstance(site.module, nn.Embedding) else ShiftGraft(pairs, site)


# -- attentions that take a cache --------------------------------------------------------------------------------------


class Preceded:
    """A key-value cache that returns some pairs before all that it is given.

    Args:
        beneath: the cache that keeps the text, if there is one.
        keys, values: (B or 1, heads, n, dim)
    """

    def __init__(self, beneath: Any, keys: Tensor, values: Tensor) -> None:
        self.beneath, self.keys, self.values = beneath, keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, heads, T, dim) each -> (B, heads, n + T, dim), T with what the cache beneath holds."""
        if self.beneath is not None:
            keys, values = self.beneath.update(keys, values, *args, **kwargs)
        return _before(self.keys, keys), _before(self.values, values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Of the pairs and what the cache beneath holds."""
        kept: int = 0 if self.beneath is None else self.beneath.get_seq_length(layer)
        return kept + self.keys.shape[2]


def _before(pairs: Tensor, text: Tensor) -> Tensor:
    return torch.cat([pairs.to(text.dtype).expand(len(text), -1, -1, -1), text], dim=2)


def attend(
    base: Base,
    place: Place,
    pair: tuple[Tensor, Tensor],
    visible: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run an attention with pairs before its keys and values.

    Args:
        pair: keys and values, (B or 1, heads, n, dim)
        visible: (B, n), which of the pairs each row has; all if None
    """
    named = dict(zip(place.names[1:], args[1:], strict=False)) | kwargs
    x: Tensor = args[0] if args else named[place.names[0]]
    assert place.cache is not None
    cache = named.get(place.cache)
    if crossed(named):
        text = None  # cross-attention: what it attends to is computed anew, not kept
    else:
        text = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder's is one of two
    past = 0 if text is None else text.get_seq_length(place.layer)
    if place.mask is not None:
        mask = named.get(place.mask)
        named[place.mask] = extended(mask, place, x, past, pair[0].shape[2], visible)
    named[place.cache] = Preceded(text, *pair)
    return base(*args[:1], **named)


def crossed(named: Mapping[str, Any]) -> str | None:
    """The argument of a cross-attention that its keys and values are made of; None for a self-attention."""
    return next((name for name in CROSSED if named.get(name) is not None), None)


def extended(mask: Any, place: Place, x: Tensor, past: int, n: int, visible: Tensor | None) -> Tensor | None:
    """An attention's mask with n columns more at the left.

    Args:
        mask: (B or 1, 1 or heads, T, keys), boolean or added to the scores; (B, keys); or None
        x: (B, T, d), what the attention is called with
        past: keys in the cache
        visible: (B, n), or None for all
    """
    kernel = getattr(place.config, "_attn_implementation", None) or "eager"
    length = x.shape[1]
    if mask is None:
        if visible is None and (not place.causal or length == 1 or kernel.startswith("flash")):
            return None  # flash attention's own causal mask ends at the last key, as it should
        mask = _own_mask(place, kernel, x, past)
    if not isinstance(mask, Tensor):
        raise ModelError(
            f"a prefix extends masks that are tensors, and {place.path} was given a {type(mask).__name__}; load the "
            "model with attn_implementation='sdpa' or 'eager'"
        )
    if visible is None:
        visible = torch.ones(1, n, dtype=torch.bool, device=mask.device)
    if mask.ndim not in (2, 4):
        raise ModelError(f"a prefix extends masks of 2 or 4 dimensions, and {place.path} was given {tuple(mask.shape)}")
    if mask.ndim == 2:
        return torch.cat([visible.to(mask.dtype).expand(len(mask), n), mask], dim=1)
    seen = visible[:, None, None]  # (B or 1, 1, 1, n)
    if not mask.is_floating_point():
        seen = seen.to(mask.dtype)
    else:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    rows = max(len(seen), len(mask))
    seen = seen.expand(rows, *mask.shape[1:3], n)
    return torch.cat([seen, mask.expand(rows, *mask.shape[1:])], dim=-1)


def _own_mask(place: Place, kernel: str, x: Tensor, past: int) -> Tensor:
    """What None stands for: (B, past + T) for flash attention, else (1, 1, T, past + T)."""
    rows, length = x.shape[:2]
    if kernel.startswith("flash"):
        return torch.ones(rows, past + length, dtype=torch.bool, device=x.device)
    mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device)
    mask = (mask.tril(past) if place.causal else mask)[None, None]
    if kernel == "eager":
        return torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    return mask


class _PrefixGraft(Graft):
    sums = False

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.owner = (pairs,)  # shared, so not registered here

    @property
    def pairs(self) -> Pairs:
        return self.owner[0]


class PairGraft(_PrefixGraft):
    """Around an attention that takes a cache."""

    def __init__(self, pairs: Pairs, place: Place) -> None:
        super().__init__(pairs)
        self.place = place

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.pairs.pair(self.place)
        return attend(base, self.place, (keys[None], values[None]), None, args, kwargs)

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        return PairRows(grafts) if alike(grafts, cls) else None


class PairRows(Graft):
    """The same for rows of different prefixes, or none: the shorter ones begin with pairs that are masked."""

    def __init__(self, grafts: Sequence[Graft | None]) -> None:
        super().__init__()
        distinct = [g for g in dict.fromkeys(grafts) if isinstance(g, PairGraft)]
        self.place = distinct[0].place
        counts = [g.pairs.count if isinstance(g, PairGraft) else 0 for g in grafts]
        n = max(counts)
        found = [g.pairs.pair(self.place) for g in distinct]
        padded = [tuple(nn.functional.pad(p, (0, 0, n - p.shape[1], 0)) for p in pair) for pair in found]
        padded.append(tuple(torch.zeros_like(p) for p in padded[0]))  # of rows without
        index = [distinct.index(g) if isinstance(g, PairGraft) else len(distinct) for g in grafts]
        keys, values = (torch.stack([pair[part] for pair in padded])[index] for part in (0, 1))
        self.counts, self.pair = counts, (keys, values)
        self.visible = right_aligned(counts, n, keys.device) if min(counts) < n else None

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        padding = base.site.context.padding
        apart = any(n and pad for n, pad in zip(self.counts, padding, strict=False))
        if apart and self.place.relative and not self.place.causal:
            raise CannotMix(
                f"a prompt of another row would move the prefix at {self.place.path} away from its text, and positions "
                "there are relative; give the rows with prompts and those with prefixes batches of their own"
            )
        return attend(base, self.place, self.pair, self.visible, args, kwargs)


# -- attentions that do not --------------------------------------------------------------------------------------------


class RoomGraft(_PrefixGraft):
    """Around an attention that takes no cache: makes room for the pairs, and cuts its outputs there off."""

    def __init__(self, pairs: Pairs, place: Place) -> None:
        super().__init__(pairs)
        self.place = place

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        n, place = self.pairs.count, self.place
        x: Tensor = args[0] if args else kwargs.pop(place.names[0])
        if x.ndim != 3:
            raise ModelError(f"a prefix goes before inputs of shape (rows, positions, width), got {tuple(x.shape)}")
        named = dict(zip(place.names[1:], args[1:], strict=False)) | kwargs
        if place.mask is not None and named.get(place.mask) is not None:
            named[place.mask] = extended(named[place.mask], place, x, 0, n, None)
        if other := crossed(named):
            return base(x, **(named | {other: nn.functional.pad(named[other], (0, 0, n, 0))}))
        if place.mask is not None:
            named[place.mask] = _roomy(named.get(place.mask), n, x.shape[1])
        out = base(nn.functional.pad(x, (0, 0, n, 0)), **named)
        return out[:, n:] if isinstance(out, Tensor) else (out[0][:, n:], *out[1:])


def _roomy(mask: Tensor | None, n: int, length: int) -> Tensor | None:
    """With n queries more, whose outputs are cut off: (B, 1, T, n + T) -> (B, 1, n + T, n + T)."""
    if mask is None or mask.ndim != 4 or mask.shape[2] != length:
        return mask
    more = torch.ones_like(mask[:, :, :1]) if mask.dtype == torch.bool else torch.zeros_like(mask[:, :, :1])
    return torch.cat([more.expand(-1, -1, n, -1), mask], dim=2)


class SwapGraft(_PrefixGraft):
    """Around a key or value projection within: puts the pairs where there is room for them."""

    def __init__(self, pairs: Pairs, place: Place, part: int) -> None:
        super().__init__(pairs)
        self.place, self.part = place, part

    def forward(self, base: Base, x: Tensor) -> Tensor:  # (B, n + T, d) -> (B, n + T, width)
        y, vectors = base(x), self.pairs.of(self.place)[:, self.part]
        first = sum(g.pairs.count for g in base.grafts if isinstance(g, SwapGraft))  # those of adapters beneath
        after = y[:, first + len(vectors) :]
        return torch.cat([y[:, :first], vectors.to(y.dtype).expand(len(y), -1, -1), after], dim=1)


# -- positions ---------------------------------------------------------------------------------------------------------


class ShiftGraft(OpeningGraft):
    """Around a model that takes positions: moves the text on."""

    def __init__(self, pairs: Pairs, site: Site) -> None:
        super().__init__(inserts=0, moves=pairs.count)
        self.names = tuple(inspect.signature(site.module.forward).parameters)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.names, args, strict=False)) | kwargs
        positions = named.get("position_ids")
        if positions is None:
            positions = text_positions(named)
        return base(**(named | {"position_ids": positions + self.moves}))


class TableGraft(_PrefixGraft):
    """Around a table of positions: reads the text's n places further on."""

    broadcasts = True

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B or 1, T) -> (B or 1, T, d)
        return moved(base, ids, self.pairs.count, self.pairs.count)

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        counts = [g.pairs.count if isinstance(g, TableGraft) else 0 for g in grafts]
        return TableRows(counts) if alike(grafts, cls) else None


class TableRows(Graft):
    """The same for rows of different prefixes."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = tuple(counts)

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B or 1, T) -> (B, T, d)
        shift = torch.tensor(self.counts, device=ids.device)[:, None]
        return moved(base, ids, shift, max(self.counts))


def moved(base: Base, ids: Tensor, shift: int | Tensor, most: int) -> Tensor:
    """A table's rows `shift` places on.

    Raises:
        ModelError: the table is too short for the text and `most` places more.
    """
    places = base.site.module.num_embeddings
    assert isinstance(places, int)
    if ids.shape[-1] + most > places:
        raise ModelError(
            f"the model has {places} positions, and {most} virtual tokens and {ids.shape[-1]} of the text do not fit; "
            "use fewer, or shorter inputs"
        )
    out: Tensor = base(ids + shift)
    return out
