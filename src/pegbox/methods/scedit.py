"""SCEdit: Controllable Image Diffusion via Skip Connection Editing (Jiang et al., CVPR 2024), arXiv:2312.11392.

    x_j: what the encoder of a U-Net hands over to its decoder, (B, C, H, W)
    T(x) = W2 gelu(W1 x + b1) + b2, at every pixel             W1: (rho C, C)   W2: (C, rho C), W2 = b2 = 0 at the start
    x_j' = x_j + tau T_j(x_j) + kappa sum_m s_m (c_mj + T_mj(x_j + c_mj))

The first term is the SC-Tuner.  The second, the CSC-Tuner, is there for every name m in `hints`: its hint image goes
through a stack of convolutions, and then through one more for each skip, zero at the start, each fed by the one before.
A forward finds hints and scales in the context: `with tuned.given(hint={"canny": edges}, control_scale=0.8)`.

Nothing in the U-Net's encoder needs autograd, and nothing of it is kept.  The authors' code tells whether the first
term is there by looking whether it is almost zero, at every step, and honours tau only below 1.  Their `use_layers`
counts in the decoder's order in one place, in the encoder's in another; here in the decoder's, and the hint's features
pass over what is left out.  Features of another size than their skip's are resized to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Context, FeatureGraft, Graft, Method, Site, Skip, Skips, Traits, setting

STEM = (16, 16, 32, 32, 96, 96)  # widths inside the hint encoder
Convolution = tuple[int, int, int]  # channels in and out, stride; its kernel is 3 x 3


class PixelMap(nn.Module):
    """T, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), _from_zero(nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class HintEncoder(nn.Module):
    """A hint image (B, channels, h, w) to a feature for every edited skip, in the encoder's order."""

    def __init__(self, stem: list[Convolution], dense: list[Convolution]) -> None:
        super().__init__()
        self.stem = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in stem)
        self.dense = nn.ModuleList(_from_zero(nn.Conv2d(i, o, 3, stride, 1)) for i, o, stride in dense)

    def forward(self, h: Tensor) -> list[Tensor]:
        features = []
        for place, conv in enumerate([*self.stem, *self.dense]):
            h = conv(F.silu(h) if place else h)
            features.append(h)
        return features[len(self.stem) :]


class SkipGraft(Graft):
    """Around an up block: edits the skips that it is called with."""

    def __init__(self, skips: Skips, block: str, method: SCEdit) -> None:
        super().__init__()
        self.owner, self.method, self.skips = (skips,), method, skips.of(block)
        words = [*["tuner"] * method.tuner, *map("hint_{}".format, method.hints)]
        pairs = [(f"{word}/{s.place}", PixelMap(s.channels, method.inner(s))) for word in words for s in self.skips]
        self.edits = nn.ModuleDict(dict(pairs))

    def forward(
        self, base: Base, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> Any:
        skips, context = list(res_hidden_states_tuple), base.site.context
        tau = context.read("tuner_scale", self.method.tuner_scale) if self.method.tuner else 0
        for skip in self.skips:
            x = edited = skips[skip.index]
            if tau:
                edited = x + tau * self.edits[f"tuner/{skip.place}"](x)
            for name, scale in self.method.scales(context).items():
                c = self.owner[0].feature(name, skip, x)
                edited = edited + scale * (c + self.edits[f"hint_{name}/{skip.place}"](x + c))
            skips[skip.index] = edited
        return base(hidden_states, tuple(skips), *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class SCEdit(Method):
    targets: str | tuple[str, ...] = setting("unet.up", "the up blocks whose skips to edit")
    down_ratio: float = setting(1.0, "rho: inner width of a tuner by the channels of its skip", above=0)
    use_layers: tuple[int, ...] = setting((), "skips to edit, counted in the decoder's order from 0; all if none")
    tuner: bool = setting(True, "edit the skips by themselves (SC-Tuner)")
    tuner_scale: float = setting(1.0, "tau, where the context gives none")
    hints: tuple[str, ...] = setting((), "names of the conditions (CSC-Tuner), such as canny")
    control_scale: float = setting(1.0, "kappa, where the context gives none")
    hint_channels: int = setting(3, "channels of a hint image", at_least=1)
    hint_ratio: float = setting(1.0, "widths in the hint encoder by those of the paper; 2 for SDXL", above=0)
    hint_width: int = setting(256, "channels that it gives; 320 for SDXL", at_least=1)
    hint_halvings: int = setting(3, "times that it halves the size; 3 where latents do", at_least=0, at_most=3)

    traits: ClassVar[Traits] = Traits(seams=("skips",), card="scedit", merge="no", needs=("skips",))
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    reads: ClassVar[tuple[str, ...]] = ("hint", "hint_scales", "control_scale", "tuner_scale")

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return [*[""] * bool(self.hints), *super().sites(model, anatomy)]

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Skips:
        return Skips(model, anatomy, super().sites(model, anatomy), self.use_layers)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft | None:
        assert isinstance(shared, Skips)
        if site.path == "":
            encoders = {name: HintEncoder(self.stem(), self.dense(shared)) for name in self.hints}
            return FeatureGraft(shared, "hint", encoders, self.scales)
        return SkipGraft(shared, site.path, self) if shared.of(site.path) else None

    def inner(self, skip: Skip) -> int:
        """rho C."""
        return max(1, int(skip.channels * self.down_ratio))

    def stem(self) -> list[Convolution]:
        """The hint encoder up to the skips; the third, fifth and seventh may halve the size."""
        widths = [self.hint_channels, *(max(1, int(w * self.hint_ratio)) for w in STEM), self.hint_width]
        s, t, u = (2 if n < self.hint_halvings else 1 for n in range(3))
        return list(zip(widths[:-1], widths[1:], [1, 1, s, 1, t, 1, u], strict=True))

    def dense(self, skips: Skips) -> list[Convolution]:
        """One for each edited skip, halving the size as the U-Net does."""
        widths = [self.hint_width, *(skip.channels for skip in skips.of_encoder)]
        levels = [0, *(skip.level for skip in skips.of_encoder)]
        return [(widths[i], widths[i + 1], 2 ** (levels[i + 1] - levels[i])) for i in range(len(widths) - 1)]

    def scales(self, context: Context) -> dict[str, float]:
        """kappa s_m by the name of a hint, where it is not zero."""
        kappa, scales = context.read("control_scale", self.control_scale), context.read("hint_scales", {})
        weights = {name: kappa * scales.get(name, 1.0) for name in self.hints}
        return {name: weight for name, weight in weights.items() if weight}

    def size(self, site: Site) -> int:
        anatomy = site.context.anatomy
        skips = self.shared(anatomy.model, anatomy)
        if site.path == "":
            return len(self.hints) * sum(9 * i * o + o for i, o, _ in [*self.stem(), *self.dense(skips)])
        pairs = [(skip.channels, self.inner(skip)) for skip in skips.of(site.path)]
        return (self.tuner + len(self.hints)) * sum(2 * c * r + c + r for c, r in pairs)


def _from_zero(conv: nn.Conv2d) -> nn.Conv2d:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
