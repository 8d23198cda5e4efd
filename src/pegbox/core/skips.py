"""The seam for skips: the tensors that the encoder of a U-Net hands over to its decoder.

A skip is known by its place in the order in which the decoder takes them: skip 0 goes into the first layer of the first
up block.  diffusers' up blocks are called with theirs as `res_hidden_states_tuple` and take them from its end, so a
graft around an up block edits that argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.context import Context
from pegbox.core.errors import ModelError, SettingsError
from pegbox.core.graft import Graft
from pegbox.core.method import Anatomy
from pegbox.core.site import Base


@dataclass(frozen=True)
class Skip:
    """One skip.

    Attributes:
        place: in the decoder's order, from 0.
        block: path of the up block that takes it.
        index: in the tuple that the block is called with, from its end.
        channels: C of (B, C, H, W).
        level: how often the encoder has halved the size before it.
    """

    place: int
    block: str
    index: int
    channels: int
    level: int


class Skips(nn.Module):
    """What the grafts of one adapter share: the skips that they edit, and features for them, made once a forward.

    Args:
        model: the base.
        anatomy: its roles; `unet.up` and `unet.down` are read.
        blocks: paths of the up blocks whose skips are edited.
        places: which skips; all of those blocks if empty.

    Raises:
        SettingsError: a place that is not there.
        ModelError: encoder and decoder do not have the same number of skips.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, blocks: Collection[str], places: Collection[int]) -> None:
        super().__init__()
        found = _skips(model, anatomy)
        known = [skip.place for skip in found if skip.block in blocks]
        if strange := sorted(set(places) - set(known)):
            raise SettingsError(f"skip {strange[0]} is none of those in {', '.join(blocks)}; they are {known}")
        self.edited = [skip for skip in found if skip.place in (places or known)]
        self.at = {skip.place: n for n, skip in enumerate(self.of_encoder)}
        self.features: dict[str, list[Tensor]] = {}  # by name, for `of_encoder`, while a forward runs

    @property
    def of_encoder(self) -> list[Skip]:
        """The edited skips in the order in which the encoder makes them."""
        return self.edited[::-1]

    def of(self, block: str) -> list[Skip]:
        """The edited skips of an up block."""
        return [skip for skip in self.edited if skip.block == block]

    def feature(self, name: str, skip: Skip, x: Tensor) -> Tensor:
        """A feature of the present forward for a skip x (B, C, H, W), resized to it."""
        feature = self.features[name][self.at[skip.place]]
        if feature.shape[-2:] == x.shape[-2:]:
            return feature
        return F.interpolate(feature, x.shape[-2:], mode="bilinear")


def _skips(model: nn.Module, anatomy: Anatomy) -> list[Skip]:
    """All skips, in the decoder's order."""
    widths = [
        (path, i, c) for path in anatomy.role("unet.up") for i, c in enumerate(_channels(model.get_submodule(path)))
    ]
    levels = _levels([model.get_submodule(path) for path in anatomy.role("unet.down")])
    if len(widths) != len(levels):
        raise ModelError(f"the decoder takes {len(widths)} skips, and the encoder makes {len(levels)}")
    return [
        Skip(place, path, -1 - i, channels, level)
        for place, ((path, i, channels), level) in enumerate(zip(widths, levels[::-1], strict=True))
    ]


def _channels(block: nn.Module) -> list[int]:
    """C of the skips that an up block takes, in order: what its layers read beyond what the one before gives."""
    layers: list[Any] = list(block.resnets)  # type: ignore[arg-type]
    if len(layers) < 2:
        raise ModelError(
            f"{type(block).__name__} has {len(layers)} layers, expected 2 or more, as in diffusers' U-Nets"
        )
    later = [layer.in_channels - before.out_channels for before, layer in itertools.pairwise(layers)]
    return [layers[0].out_channels, *later]


def _levels(blocks: Sequence[nn.Module]) -> list[int]:
    """How often the size is halved before each skip, in the encoder's order; the first is that of the input layer."""
    levels = [0]
    for block in blocks:
        now = levels[-1]
        levels += [now] * len(block.resnets)  # type: ignore[arg-type]
        levels += [now + 1] * bool(block.downsamplers)
    return levels


class FeatureGraft(Graft):
    """Around the U-Net: makes the features of `Skips` from what the context gives, once a forward.

    Args:
        skips: of the adapter.
        word: the name in the context, under which is one tensor with a row for each of the batch or one for all, or,
            where there are several encoders, a tensor for each name.
        encoders: by name, from such a tensor to a feature for each edited skip, in the encoder's order.
        wanted: from the context to the names that this forward needs; the others may be missing.
    """

    prepares = True

    def __init__(
        self, skips: Skips, word: str, encoders: Mapping[str, nn.Module], wanted: Callable[[Context], Collection[str]]
    ) -> None:
        super().__init__()
        self.owner, self.word, self.wanted = (skips,), word, wanted  # shared, so not registered here
        self.encoders = nn.ModuleDict(encoders)

    def forward(self, base: Base, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        skips, context = self.owner[0], base.site.context
        given = context.read(self.word, like=sample)
        if isinstance(given, Tensor) and len(self.encoders) == 1:
            given = dict.fromkeys(self.encoders, given)
        for name in self.wanted(context):
            skips.features[name] = self.encoders[name](self._one(given, name, len(sample)))
        try:
            return base(sample, *args, **kwargs)
        finally:
            skips.features.clear()

    def _one(self, given: Any, name: str, rows: int) -> Tensor:
        value = given.get(name) if isinstance(given, Mapping) else None
        if not isinstance(value, Tensor) or len(value) not in (1, rows):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(given).__name__} in its place"
            raise ModelError(
                f"this forward needs {self.word} {name!r} of 1 row or {rows}, got {got}; "
                f"run it inside tuned.given({self.word}=...)"
            )
        return value
