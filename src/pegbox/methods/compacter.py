"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (Karimi Mahabadi et al., 2021), arXiv:2106.04647.

    h' = h + act(h H_1 + b_1) H_2 + b_2        h: (..., d), what a sub-layer adds to the residual stream
    H = sum_j C_j (x) (L_j R_j)                (x): Kronecker's product, j = 1..n
    C_j: (n, n)   L_j: (in / n, k)   R_j: (k, out / n)        in, out = d, m = d / reduction, or m, d

One C (n, n, n), drawn with a deviation of 1e-4, serves every H of the model; L and R, rank k = 1, are each layer's
own.  After attention and after the MLP; Compacter++ after the MLP alone.  The layer norms of the base train too, as
differences from its own.  A PHM adapter has a full (in / n, out / n) in the place of L_j R_j, and in every H a C of its
own.  n divides d and m.  The authors' code has no adapter after cross-attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Graft, Method, Preset, Site, Traits, by_settings, setting
from pegbox.core.bottleneck import ACTIVATIONS
from pegbox.core.difference import DifferenceGraft
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.layout import is_linear


class Rule(nn.Module):
    """C: (n, n, n)."""

    def __init__(self, n: int, deviation: float) -> None:
        super().__init__()
        self.c = nn.Parameter(deviation * torch.randn(n, n, n))


class PHMLinear(nn.Module):
    """x H + b: (..., in) -> (..., out)."""

    def __init__(self, in_: int, out: int, method: Compacter) -> None:
        super().__init__()
        n = method.division
        if method.factorized:
            self.left = _drawn(n, in_ // n, method.rank)
            self.right = _drawn(n, method.rank, out // n)
        else:
            self.full = _drawn(n, in_ // n, out // n)
        self.rule = None if method.share else Rule(n, method.deviation)
        self.bias = nn.Parameter(torch.zeros(out))
        self.factorized = method.factorized

    def matrix(self, c: Tensor | None) -> Tensor:
        """H (in, out), from the shared C, or the own one."""
        parts = self.left @ self.right if self.factorized else self.full  # (n, in/n, out/n)
        return torch.einsum("jab,jkp->akbp", c if self.rule is None else self.rule.c, parts).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, self.matrix(c).T, self.bias)


def _drawn(n: int, rows: int, columns: int) -> nn.Parameter:
    """n matrices, each as Glorot and Bengio draw them, times sqrt(2)."""
    matrices = torch.empty(n, rows, columns)
    for matrix in matrices:
        nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))
    return nn.Parameter(matrices)


class CompacterGraft(Graft):
    def __init__(self, site: Site, rule: Rule | None, method: Compacter) -> None:
        super().__init__()
        width, narrow = method.widths(site)
        self.down, self.up = PHMLinear(width, narrow, method), PHMLinear(narrow, width, method)
        self.activation = ACTIVATIONS[method.activation]
        self.owner = (rule,)  # shared, so not registered here

    def forward(self, base: Base, x: Tensor) -> Tensor:
        h: Tensor = base(x)
        c = None if self.owner[0] is None else self.owner[0].c.to(h.dtype)
        return h + self.up(self.activation(self.down(h, c)), c)


TRAITS = Traits(seams=("output",), card="compacter", merge="no")
DRAWN = replace(TRAITS, identity=False)  # what is added goes with the square of C: 1e-8 by default, beyond float32


@dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    targets: str | tuple[str, ...] = setting(("attn.out", "mlp.down"), "the output projections to follow")
    division: int = setting(4, "n: terms of a sum, and the side of each C_j", at_least=1)
    reduction: int = setting(32, "the bottleneck is 1 / reduction of the width", at_least=1)
    rank: int = setting(1, "rank of L_j R_j", at_least=1)
    activation: Literal["tanh", "relu", "gelu", "gelu_new", "silu"] = setting("gelu_new", "between the two maps")
    factorized: bool = setting(True, "L_j R_j; otherwise a full matrix, as in PHM adapters")
    share: bool = setting(True, "one C for the whole model; otherwise one for every H")
    deviation: float = setting(1e-4, "of the draw of C", above=0)
    norms: bool = setting(True, "train the base's layer norms too")

    traits: ClassVar[Traits] = by_settings(TRAITS, lambda method: TRAITS if method.deviation <= 1e-3 else DRAWN)
    presets: ClassVar[dict[str, Preset]] = {
        "compacter++": Preset(
            "Karimi Mahabadi et al., 2021, arXiv:2106.04647, code: compacter++.json", {"targets": ("mlp.down",)}
        ),
        "phm-adapter": Preset(
            "Karimi Mahabadi et al., 2021, arXiv:2106.04647, code: phm_adapters.json",
            {"division": 12, "factorized": False, "share": False, "deviation": 0.01},
        ),
    }

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return [*super().sites(model, anatomy), *(self._norms(anatomy) if self.norms else [])]

    def _norms(self, anatomy: Anatomy) -> list[str]:
        try:
            return anatomy.resolve("norm", layers=self.layers, kinds=(nn.Module,), who=f"{self.name()}.norms")
        except TargetError:  # a model without norms has none to train
            return []

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Rule | None:
        return Rule(self.division, self.deviation) if self.share else None

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        if not is_linear(site.module):
            return DifferenceGraft(site)
        assert shared is None or isinstance(shared, Rule)
        return CompacterGraft(site, shared, self)

    def widths(self, site: Site) -> tuple[int, int]:
        """d and m at a site."""
        width = site.shape[0]
        narrow = width // self.reduction
        if narrow < 1:
            raise SettingsError(f"compacter.reduction must be 1..{width} at {site.path}, got {self.reduction}")
        if width % self.division or narrow % self.division:
            raise SettingsError(
                f"compacter.division must divide the width {width} of {site.path} and its bottleneck {narrow}, "
                f"got {self.division}"
            )
        return width, narrow

    def size(self, site: Site) -> int:
        if not is_linear(site.module):
            return sum(p.numel() for p in site.module.parameters(recurse=False))
        d, m = self.widths(site)
        n, rule = self.division, 0 if self.share else self.division**3
        one = self.rank * (d + m) if self.factorized else d * m // n
        return 2 * (one + rule) + d + m

    def shared_size(self) -> int:
        return self.division**3 if self.share else 0
