"""The seam for taps: a trained network beside a frozen trunk, which reads what the trunk's blocks give.

    h_0 -> block 1 -> h_1 -> .. -> block L -> h_L -> (norm) -> z        h: (B, T, d)
    z' = z + up(side(h_0 .. h_L))                                       what the head reads in the place of z

The blocks run without autograd: nothing of theirs is kept for a backward pass, gradient checkpointing or not, and no
gradient enters them.  So the side network joins where the trunk ends, at the output of the module that holds the list
of blocks.  In an encoder-decoder the encoder's side is not joined there, since its gradient could not come back
through the decoder's blocks; its states go to the decoder's side, with the encoder's outputs, also through
`generate`.  A side network that attends keeps its keys and values as further layers of the model's own cache.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import ModelError, TargetError
from pegbox.core.graft import Graft
from pegbox.core.method import Anatomy
from pegbox.core.site import Base, Site, first_tensor

CACHES = ("cache", "past_key_values")  # what transformers calls a key-value cache, and called it at first
NORMS = ("norm.attn", "norm.mlp", "norm.block")  # roles of modules as wide as the hidden states


@dataclass(frozen=True)
class Trunk:
    """One stack of blocks.

    Attributes:
        path: of the module that holds the list of blocks.
        blocks: their paths.
        width: d of the hidden states.
        causal: a token attends to those before it only.
        encoder: of an encoder-decoder; its side is read by the decoder's.
        crosses: the decoder of one.
    """

    path: str
    blocks: tuple[str, ...]
    width: int
    causal: bool
    encoder: bool
    crosses: bool

    @classmethod
    def at(cls, path: str, module: nn.Module, anatomy: Anatomy) -> Trunk:
        """The trunk that `module`, at `path`, holds."""
        blocks = tuple(block for block in anatomy.blocks if holder(block) == path)
        first = module.get_submodule(blocks[0].removeprefix(f"{path}."))
        # transformers' attention modules say so; what does not, attends both ways
        causal = any(getattr(part, "is_causal", False) for part in first.modules())
        encoder, decoder = (set(_role(anatomy, f"{side}.block")) for side in ("encoder", "decoder"))
        return cls(path, blocks, _width(path, module, anatomy), causal, blocks[0] in encoder, blocks[0] in decoder)


def holder(block: str) -> str:
    """The path of the module that holds the list in which `block` is: `model` for `model.layers.3`.

    Raises:
        TargetError: it is no member of a list.
    """
    in_list, _, place = block.rpartition(".")
    if not place.isdigit():
        raise TargetError(f"{block!r} is no member of a list of blocks, expected a path such as 'model.layers.3'")
    return in_list.rpartition(".")[0]


def trunks(model: nn.Module, anatomy: Anatomy, read: Iterable[str]) -> list[Trunk]:
    """The stacks in which the blocks `read` lie, an encoder before its decoder.

    Raises:
        TargetError: they lie in stacks of which the second does not read the first, or in one that gives no hidden
            states because it holds the head itself, or whose last blocks are not read.
    """
    paths = list(dict.fromkeys(holder(block) for block in read))
    found = [Trunk.at(path, model.get_submodule(path), anatomy) for path in paths]
    ends = [trunk.path or "the model" for trunk in found if not trunk.encoder]
    if len(ends) != 1:
        what = f"{len(ends)} stacks of blocks end where a side network would join ({', '.join(ends) or 'none'})"
        raise TargetError(f"{what}, expected 1: name the blocks of one stack, or of an encoder and its decoder")
    for trunk in found:
        heads = [path for path in _role(anatomy, "head") if not trunk.path or path.startswith(f"{trunk.path}.")]
        if heads:
            raise TargetError(
                f"{trunk.path or 'the model'} holds its head {heads[0]!r} beside its blocks, so that no module gives "
                "the hidden states that a side network joins"
            )
        if more := _later(model, trunk):
            raise TargetError(
                f"the rest of the model reads {trunk.path or 'the model'} up to {trunk.blocks[-1]}, and {more[0]} "
                "follows, so that nothing reads what a side network joins at its end"
            )
    return found


def _later(model: nn.Module, trunk: Trunk) -> list[str]:
    """Paths of what stands in the list of blocks behind the last of them."""
    in_list = trunk.blocks[-1].rpartition(".")[0]
    members = [f"{in_list}.{name}" for name, _ in model.get_submodule(in_list).named_children()]
    return members[members.index(trunk.blocks[-1]) + 1 :]


@dataclass
class Tape:
    """What one forward of a trunk has given so far.

    Attributes:
        owner: the adapter's mark on what it keeps in the cache.
        start: h_0, (B, T, d).
        outputs: of the blocks that are read, in order, (B, T, d) each.
        mask: what the blocks attend to, (B or 1, 1, T, S), true or 0 where they do; None without limits but causality.
        cross_mask: the same over the encoder's tokens.
        encoded: the states of the encoder's side, (B, S, n).
        cache: the model's key-value cache, if it keeps one.
    """

    owner: str
    start: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    cross_mask: Tensor | None = None
    encoded: Tensor | None = None
    cache: Any = None

    def remembered(self, at: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, those before from the cache: (B, heads, T, d) -> (B, heads, S, d).

        Args:
            at: which of the side network's layers asks.
        """
        if self.cache is None:
            return key, value
        mine = [layer for layer in self.cache.layers if getattr(layer, "tapped_by", None) == (self.owner, at)]
        layer = mine[0] if mine else self._new_layer(at)
        both: tuple[Tensor, Tensor] = layer.update(key, value)
        return both

    def _new_layer(self, at: int) -> Any:
        from transformers.cache_utils import DynamicLayer  # there is a cache, so it is there

        layer: Any = DynamicLayer()
        layer.tapped_by = (self.owner, at)
        self.cache.layers.append(layer)  # after the base's own, which it has made in this very forward
        return layer


class Taps(nn.Module):
    """What the grafts of one adapter share: the trunks, which of their blocks are read, and the tape now running.

    Args:
        model: the base.
        anatomy: its roles.
        read: paths of the blocks to read.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, read: Sequence[str]) -> None:
        super().__init__()
        self.read = frozenset(read)
        self.trunks = {trunk.path: trunk for trunk in trunks(model, anatomy, read)}
        self.word = f"side_states_{id(self)}"  # where an encoder's output carries the states of its side
        self.tape: Tape | None = None
        self.encoded: Tensor | None = None


def tap_sites(model: nn.Module, anatomy: Anatomy, read: Sequence[str]) -> list[str]:
    """The sites of a method of taps: every block of the trunks, the trunks, and the model where it has an encoder."""
    found = trunks(model, anatomy, read)
    whole = [""] if any(trunk.encoder for trunk in found) else []
    return [*whole, *(path for trunk in found for path in (trunk.path, *trunk.blocks))]


def tap_graft(site: Site, taps: Taps, side: Callable[[Trunk], SideGraft]) -> Graft:
    """What runs around one of `tap_sites`; `side` makes the graft of a trunk."""
    if site.path in taps.trunks:
        return side(taps.trunks[site.path])
    return BetweenGraft(taps) if site.path == "" else TapGraft(taps, site)


class TapGraft(Graft):
    """Around a block: runs it without autograd and notes what it gave."""

    def __init__(self, taps: Taps, site: Site) -> None:
        super().__init__()
        self.owner, self.is_read = (taps,), site.path in taps.read  # shared, so not registered here
        self.names = tuple(inspect.signature(site.module.forward).parameters)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = base(*args, **kwargs)
        tape = self.owner[0].tape
        if tape is None:
            return out
        if tape.start is None:
            given = dict(zip(self.names, args, strict=False)) | kwargs
            tape.start = first_tensor(given.values())
            tape.mask, tape.cross_mask = (_mask(given.get(f"{of}attention_mask")) for of in ("", "encoder_"))
        if self.is_read:
            tape.outputs.append(out if isinstance(out, Tensor) else out[0])
        return out


class SideGraft(Graft):
    """Around a trunk: runs it, then the side network.  A subclass says `side` and `up`."""

    def __init__(self, taps: Taps, trunk: Trunk) -> None:
        super().__init__()
        self.owner, self.trunk = (taps,), trunk

    @abstractmethod
    def side(self, tape: Tape) -> Tensor:
        """The side network's last states, (B, T, n)."""

    @abstractmethod
    def up(self, states: Tensor) -> Tensor:
        """What they add to the trunk's output, (B, T, n) -> (B, T, d); not called for an encoder with a decoder."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        taps = self.owner[0]
        taps.tape = tape = Tape(taps.word, encoded=taps.encoded if self.trunk.crosses else None)
        try:
            out = base(*args, **kwargs)
        finally:
            taps.tape = None
        tape.cache = _cache(out)
        states = self.side(tape)
        if not self.trunk.encoder:
            return _added(out, self.up(states), self.trunk)
        taps.encoded = states
        if isinstance(out, Mapping):
            out[taps.word] = states  # type: ignore[index]  # where `generate` keeps and repeats it
        return out


class BetweenGraft(Graft):
    """Around an encoder-decoder: brings the states of the encoder's side to the decoder's."""

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.owner = (taps,)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        taps = self.owner[0]
        given = kwargs.get("encoder_outputs")
        taps.encoded = given.get(taps.word) if isinstance(given, Mapping) else None
        if given is not None and taps.encoded is None:
            raise ModelError("these encoder_outputs come from the encoder without this adapter; encode them with it")
        try:
            return base(*args, **kwargs)
        finally:
            taps.encoded = None


def _added(out: Any, change: Tensor, trunk: Trunk) -> Any:
    """A trunk's output with `change` (B, T, d) added to its hidden states, and to the last of a list that ends in them.

    Some models go on from the list (DeBERTa).
    """
    if isinstance(out, Tensor):
        return out + change
    if isinstance(out, tuple):
        joined = out[0] + change
        return tuple(_joined(value, out[0], joined) for value in out)
    if not isinstance(out, Mapping) or out.get("last_hidden_state") is None:
        raise ModelError(f"{trunk.path or 'the model'} gives no hidden states, but {type(out).__name__}")
    last = out["last_hidden_state"]
    joined = last + change
    for name, value in list(out.items()):
        out[name] = _joined(value, last, joined)  # type: ignore[index]
    return out


def _joined(value: Any, last: Tensor, joined: Tensor) -> Any:
    """An output, with `joined` where `last` stands in it."""
    if value is last:
        return joined
    ends = isinstance(value, (tuple, list)) and len(value) > 0 and value[-1] is last
    return (*value[:-1], joined) if ends else value


def _cache(out: Any) -> Any:
    """The cache of self-attention among a trunk's outputs, or None."""
    kept = [out.get(name) for name in CACHES] if isinstance(out, Mapping) else []
    cache = next((cache for cache in kept if cache is not None), None)
    return getattr(cache, "self_attention_cache", cache)  # an encoder-decoder keeps two in one


def _mask(mask: Any) -> Tensor | None:
    """What blocks attend to, boolean or to be added to scores; DeBERTa's, of whole numbers, is 1 where they do."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        raise ModelError(
            f"a side network reads masks of shape (rows, 1, tokens, tokens), got {getattr(mask, 'shape', mask)}; "
            "load the model with attn_implementation='sdpa'"
        )
    return mask if mask is None or mask.is_floating_point() else mask.bool()


def _width(path: str, module: nn.Module, anatomy: Anatomy) -> int:
    inside = [p for role in NORMS for p in _role(anatomy, role) if not path or p.startswith(f"{path}.")]
    sizes = [part.numel() for p in inside for part in module.get_submodule(p.removeprefix(f"{path}.")).parameters()]
    if not sizes:
        raise TargetError(f"the width of {path or 'the model'} is unknown: its blocks have no norm")
    return max(sizes)


def _role(anatomy: Anatomy, name: str) -> list[str]:
    return anatomy.roles().get(name, [])
