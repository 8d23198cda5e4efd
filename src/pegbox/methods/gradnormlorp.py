"""GradNormLoRP: Gradient Weight-normalized Low-rank Projection for Efficient LLM Training (Huang et al., 2025),
arXiv:2412.19616.

    mode=adapter:   W' = m * (W + s B A) / |W + s B A|                  DoRA; m, A and B train
    mode=full:      W = g * V / |V|                                     g and V train, W itself stands for V
    both:           Adam on  L D, D R^T or L D R^T  in the place of D   D: (out, in), the gradient of A, B or V

g: (out,), |.| over rows.  L: (r', out) and R: (r', in) are the first singular vectors of D, taken anew every `gap`
steps; r' is `projection_rank`, and what Adam gives is mapped back by their transposes and multiplied by `scale`.  m, g,
other vectors, matrices with a side of at most r', and modules that are trained whole beside it, a head say, have plain
Adam: of A and B, nothing is saved unless r' < r.

The optimizer is `pegbox.updates.projected`; `pegbox.Trainer` takes it from here.

The paper's text normalises columns; its code and this, rows of the tensor as it is stored.  In the authors' dense
optimizer g is set to |V| before each step, which forgets what it learned, a copy of W stands for V, and the gradient of
V keeps its part along V.  Here g is its own, there is no copy, and the gradient is (I - v v^T / |v|^2) D.  Their
command for fine-tuning does not wrap the model in DoRA at all; `mode=adapter` is what the text says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pegbox.core import Anatomy, Preset, Traits, by_settings, setting
from pegbox.core.errors import SettingsError
from pegbox.core.method import split_names
from pegbox.core.selection import targeted
from pegbox.methods import dora
from pegbox.updates.projected import ProjectedAdamW, Projection


def _ours(traits: Traits) -> Traits:
    peft = replace(traits.peft, claims=False) if traits.peft else None
    return replace(traits, seams=("weight", "update"), card="gradnormlorp", peft=peft)


USUAL, APART = _ours(dora.USUAL), _ours(dora.APART)
FULL = Traits(
    seams=("selection", "update"),
    card="gradnormlorp",
    keeps_base=False,
    per_row=False,
    xfail={"dropout_acts_in_training": "mode=full has no adapter, whose inputs could be dropped"},
)


@dataclass(frozen=True, kw_only=True)
class GradNormLoRP(dora.DoRA):
    mode: Literal["adapter", "full"] = setting("adapter", "train a DoRA, or the targets' own tensors")
    projection_rank: int = setting(4, "rank of the subspace in which Adam runs", at_least=1)
    gap: int = setting(50, "optimizer steps between two subspaces", at_least=1)
    scale: float = setting(1.0, "of a projected update, times the learning rate", above=0)
    projection: Projection = setting("std", "what of a gradient is projected; std: its shorter side")  # noqa: RUF009
    bits: Literal[8, 32] = setting(32, "8 keeps Adam's moments quantised, with bitsandbytes")
    plain: str | tuple[str, ...] = setting((), "modules with plain Adam: ends of paths, or a regex over them")

    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: method.chosen())
    presets: ClassVar[dict[str, Preset]] = {
        "glue": Preset(
            "Huang et al., 2025, arXiv:2412.19616, code: RoBERTa-base on GLUE, lr 3e-5",
            {"rank": 8, "alpha": 16.0, "dropout": 0.1, "projection_rank": 4, "gap": 500, "scale": 4.0},
        ),
        "llama-60m": Preset(
            "Huang et al., 2025, arXiv:2412.19616, code: pre-training LLaMA-60M on C4, lr 0.01",
            {"mode": "full", "targets": ".*", "plain": ("embed_tokens", "lm_head")}
            | {"projection_rank": 128, "gap": 200, "scale": 0.25},
        ),
    }
    small: ClassVar[dict[str, Any]] = {"bits": 32}

    def chosen(self) -> Traits:
        """What holds of the mode."""
        return FULL if self.mode == "full" else APART if self.apart else USUAL

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return [] if self.mode == "full" else super().sites(model, anatomy)

    def selects(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return targeted(self, model, anatomy, layers=self.layers) if self.mode == "full" else []

    def calibrates(self) -> bool:
        return self.mode == "adapter" and super().calibrates()

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW in subspaces, over groups that have the names of their parameters.

        Raises:
            SettingsError: `plain` names nothing that trains.  MissingExtra: 8 bits without bitsandbytes.
        """
        names = [name for group in groups for name in group["names"]]
        if self.plain and not any(map(self._named_plain, names)):
            raise SettingsError(f"gradnormlorp.plain names nothing that trains: {self.plain!r}; there is {names[0]!r}")
        return ProjectedAdamW(
            [part for group in groups for part in self.parted(group)],
            rank=self.projection_rank,
            gap=self.gap,
            scale=self.scale,
            projection=self.projection,
            normalised=self.mode == "full",
            bits=self.bits,
        )

    def parted(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group as what is projected, and what has plain Adam: modules trained whole, and those of `plain`."""
        named = list(zip(group["names"], group["params"], strict=True))
        parts = []
        for plain in (False, True):
            inside = [(n, p) for n, p in named if plain == (n.startswith("copy.") or self._named_plain(n))]
            if inside:
                more = {"rank": None} if plain else {}
                parts.append(group | more | {"names": [n for n, _ in inside], "params": [p for _, p in inside]})
        return parts

    def _named_plain(self, name: str) -> bool:
        names = split_names(self.plain)
        ends = "|".join(f"(?:{end})" for end in ((names,) if isinstance(names, str) else names))
        return bool(ends) and re.fullmatch(rf"(.*\.)?(?:{ends})\.[^.]+", name) is not None
