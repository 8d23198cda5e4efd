"""S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity (Yang et al., 2024),
arXiv:2412.06289.

    mlp.down, attn.out    W[:, i] += D      D: (out, s), zeros at the start    i: s input channels
    mlp.up, attn.v        W[i, :] += D      D: (s, in)                         i: s output channels

A unit of the MLP is one inner channel; one of attention is a head of keys and values with all the queries that share
it.  Of a role's units in all layers together int(share * units * layers) are drawn, at least one, so that layers get
unequal numbers of them.  With another `choose` every layer has as many, those of largest or smallest norm of weights,
or of activations on the first batches of the training data.

The official code permutes weights until chosen channels are neighbours, ordered so that choices for up and down, or
for v and out, may overlap; it takes heads of queries for those of keys and values, and leaves biases behind.  Here an
index addresses the channels: the base stays as it is, and an overlap is nothing special.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Data, Down, LowRankGraft, Method, Site, Traits, Tuned, setting
from pegbox.core.channels import frozen_linear, input_channels, output_channels
from pegbox.core.errors import SettingsError
from pegbox.core.method import split_names
from pegbox.core.observe import observe
from pegbox.core.site import widened

SHARES = {"mlp.down": "down", "mlp.up": "up", "attn.out": "out", "attn.v": "v"}  # role: setting
OUTPUTS, HEADS = ("mlp.up", "attn.v"), ("attn.out", "attn.v")
BATCHES = 8  # looked at for activations


class ChannelGraft(LowRankGraft):
    """D on the channels `index` (s,) along one side of a matrix: 1, its inputs, or 0, its outputs."""

    index: Tensor

    def __init__(self, site: Site, units: list[int], unit: int, side: int) -> None:
        super().__init__()
        self.width, self.unit, self.side = site.shape[side], unit, side
        self.register_buffer("index", _channels(torch.tensor(units), unit))
        shape = (site.shape[0], len(self.index)) if side else (len(self.index), site.shape[1])
        self.d = nn.Parameter(torch.zeros(shape))

    def factors(self) -> tuple[Down, Tensor, float]:
        pick = F.one_hot(self.index, self.width).to(self.d)  # (s, width)
        return (pick, self.d, 1.0) if self.side else (self.d, pick.T, 1.0)

    def weight(self, w: Tensor) -> Tensor:
        return w.index_add(self.side, self.index, self.d.to(w))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        found = frozen_linear(base)
        if found is None:
            return super().forward(base, x)
        return (input_channels if self.side else output_channels)(x, *found, self.index, self.d)

    def take(self, squares: Tensor, *, smallest: bool) -> None:
        """Choose anew, as many as there are, by the squared norm of every channel (width,)."""
        norms = squares.view(-1, self.unit).sum(1)
        best = norms.topk(len(self.index) // self.unit, largest=not smallest).indices
        self.index.copy_(_channels(best.sort().values, self.unit))


def _channels(units: Tensor, size: int) -> Tensor:
    """(u,) -> (u * size,): units are `size` channels wide."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


@dataclass(frozen=True, kw_only=True)
class S2FT(Method):
    targets: str | tuple[str, ...] = setting(
        (), "what to choose from instead of the roles whose share is above 0; another module has the share `down`"
    )
    down: float = setting(0.03, "share of the MLP's inner units: inputs of mlp.down", at_least=0, at_most=1)
    up: float = setting(0.0, "share of the MLP's inner units: outputs of mlp.up", at_least=0, at_most=1)
    out: float = setting(0.0, "share of the heads of keys and values: inputs of attn.out", at_least=0, at_most=1)
    v: float = setting(0.0, "share of the heads of keys and values: outputs of attn.v", at_least=0, at_most=1)
    choose: Literal["random", "weight", "activation"] = setting("random", "by which units are chosen")
    smallest: bool = setting(False, "the units of smallest norm, where the choice is not random")
    draw_seed: int = setting(0, "of the draw")

    traits: ClassVar[Traits] = Traits(seams=("weight",), card="s2ft", linear=True, to_lora=True)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return [path for paths in self._by_role(anatomy).values() for path in paths]

    def graft(self, site: Site, shared: nn.Module | None) -> ChannelGraft | None:
        side, unit, units = self._drawn(site)
        if not units:
            return None
        graft = ChannelGraft(site, units, unit, side)
        if self.choose == "weight":
            graft.take(widened(site.read("weight").detach()).square().sum(1 - side).cpu(), smallest=self.smallest)
        return graft

    def size(self, site: Site) -> int:
        side, unit, units = self._drawn(site)
        return len(units) * unit * site.shape[1 - side]

    def calibrates(self) -> bool:
        return self.choose == "activation"

    def calibrate(self, tuned: Tuned, data: Data) -> None:
        grafts = {p: g for p, s in tuned.sites.items() for g in s.chain if isinstance(g, ChannelGraft)}
        squares = {path: torch.zeros(graft.width, device=graft.d.device) for path, graft in grafts.items()}

        def see(path: str, x: Tensor, y: Tensor) -> None:
            seen = x if grafts[path].side else y
            squares[path] += widened(seen).square().flatten(0, -2).sum(0)

        if self.calibrates():
            observe(tuned, data, see, grafts, most=BATCHES)
            for path, graft in grafts.items():
                graft.take(squares[path], smallest=self.smallest)

    def _by_role(self, anatomy: Anatomy) -> dict[str, list[str]]:
        """Role to the paths to choose from."""
        rest: Any = {"exclude": split_names(self.exclude), "layers": self.layers, "kinds": self.kinds, "parts": True}
        shares = {role: getattr(self, name) for role, name in SHARES.items()}
        if not any(shares.values()):
            raise SettingsError(f"of s2ft.{', s2ft.'.join(SHARES.values())} one must be above 0, they are all 0")
        if not self.targets:
            return {role: anatomy.resolve(role, **rest, who=self.name()) for role, share in shares.items() if share}
        roles = {path: role for role in shares for path in anatomy.roles().get(role, ())}
        found: dict[str, list[str]] = {}
        for path in anatomy.resolve(split_names(self.targets), **rest, who=self.name()):
            found.setdefault(roles.get(path, "mlp.down"), []).append(path)
        if unset := [role for role in found if not shares[role]]:
            raise SettingsError(f"s2ft.{SHARES[unset[0]]} is 0, and s2ft.targets names {found[unset[0]][0]}")
        return found

    def _drawn(self, site: Site) -> tuple[int, int, list[int]]:
        """Side, width of a unit, and the units of a site that are drawn."""
        anatomy = site.context.anatomy
        role, paths = next((r, paths) for r, paths in self._by_role(anatomy).items() if site.path in paths)
        side = 0 if role in OUTPUTS else 1
        unit = site.shape[side] // anatomy.kv_heads(site.path) if role in HEADS else 1
        units, place = site.shape[side] // unit, paths.index(site.path)
        count = max(1, int(getattr(self, SHARES[role]) * units * len(paths)))
        drawn = random.Random(f"{self.draw_seed}/{role}").sample(range(units * len(paths)), count)
        return side, unit, sorted(d % units for d in drawn if d // units == place)
