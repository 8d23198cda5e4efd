"""The settings of LoRA and of what is built on it, and its factors with where they start.

    W' = W + s (B A - B_0 A_0)        A: (r, in)   B: (out, r)

Starts are files of `pegbox.core.starts`.  Where A_0 and B_0 stand apart, the change is computed as

    B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0)

which is zero to the last bit at the start, and no difference of large numbers in low precision later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pegbox.core import starts
from pegbox.core.method import Method
from pegbox.core.settings import setting
from pegbox.core.site import Site

if TYPE_CHECKING:
    from pegbox.core.calibration import Data
    from pegbox.core.tuned import Tuned

PEFT_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "ranks": "rank_pattern",
    "alphas": "alpha_pattern",
}
PEFT_FIXED = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
# the others take something out of the base that the file does not hold, or draw it anew: `loftq`, `pissa_niter_N`
PEFT_STARTS = (True, False, "gaussian", "orthogonal", "eva", "pissa", "olora")

# what `peft_loads_ours` meets where A_0 and B_0 stand apart
PEFT_TRAINS_ALL = "PEFT loads A_0 and B_0 as part of one LoRA, and so gives them gradients; here they are frozen"


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """Rank, scale and start, and how HF PEFT's files hold the factors."""

    rank: int = setting(16, "rank of the update: rows of A, columns of B", at_least=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    ranks: Mapping[str, int] = field(
        default_factory=dict, metadata={"help": "other ranks, by the end of a path or a regex over it; 0: no update"}
    )
    alphas: Mapping[str, float] = field(default_factory=dict, metadata={"help": "other alphas, in the same way"})
    start: str = setting("default", "where A and B start: default, gaussian, pissa, olora, eva, lora_ga")
    start_settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of the start"})

    found: ClassVar[tuple[str, ...]] = ("ranks", "alphas")

    def rank_at(self, path: str) -> int:
        """r of a site."""
        return int(value_at(self.ranks, path, self.rank))

    def factor_at(self, path: str) -> float:
        """s of a site."""
        rank = self.rank_at(path)
        return value_at(self.alphas, path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @cached_property
    def started(self) -> starts.Start:
        """The start.

        Raises:
            SettingsError: an unknown one, or a setting that it does not have.
        """
        return starts.get(self.start, self.start_settings)

    @property
    def apart(self) -> bool:
        """Whether A_0 and B_0 stand beside the factors."""
        return self.started.apart

    def size(self, site: Site) -> int | None:
        return self.rank_at(site.path) * sum(site.shape)

    def calibrates(self) -> bool:
        return self.started.looks or type(self).calibrate is not LowRankMethod.calibrate

    def calibrate(self, tuned: Tuned, data: Data) -> None:
        if self.started.looks:
            for name in [name for name in tuned.active if tuned.adapter(name).method is self]:
                self.started.look(tuned, name, data)

    # HF PEFT's files hold factors that stand apart as the LoRA of twice the rank that it is: [A; A_0], [B, -B_0].

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        if not self.apart:
            return {}
        more = math.sqrt(2) if self.rslora else 2
        return {
            "r": 2 * self.rank,
            "lora_alpha": self.alpha * more,
            "rank_pattern": {path: 2 * rank for path, rank in self.ranks.items()},
            "alpha_pattern": {path: alpha * more for path, alpha in self.alphas.items()},
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        start = config.get("init_lora_weights")
        return {"start": start} if start in ("pissa", "olora") else {}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "a0" not in tensors:
            return dict(tensors)
        kept = dict(tensors)
        a0, b0 = kept.pop("a0"), kept.pop("b0")
        return kept | {"a": torch.cat([kept["a"], a0]), "b": torch.cat([kept["b"], -b0], dim=1)}

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "a0" not in own or not {"a", "b"} <= tensors.keys():
            return dict(tensors)
        a, b, rank = tensors["a"], tensors["b"], len(own["a"])
        if len(a) == rank:  # PEFT's unconverted file: it too takes A_0 and B_0 from the base
            return {**tensors, "a0": own["a0"], "b0": own["b0"]}
        parts = {"a": a[:rank], "a0": a[rank:], "b": b[:, :rank], "b0": -b[:, rank:]}
        return {**tensors, **parts}


def value_at(values: Mapping[str, float], path: str, otherwise: float) -> float:
    """The value whose name is a path, the end of it, or a regex over either; as HF PEFT's patterns."""
    return next((v for name, v in values.items() if re.fullmatch(rf"(.*\.)?({name})", path)), otherwise)


class StartedFactors(nn.Module):
    """Holds A and B, and A_0 and B_0 where they stand apart."""

    a0: Tensor | None
    b0: Tensor | None

    def start(self, site: Site, method: LowRankMethod) -> None:
        """Make the factors.

        Raises:
            SettingsError: a rank above what the site's matrix can have, or an unknown start.
        """
        start, scale = method.started, method.factor_at(site.path)
        a, b = start.factors(site, method.rank_at(site.path), scale)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("a0", a.clone() if start.apart else None)
        self.register_buffer("b0", b.clone() if start.apart else None)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor | None = None) -> None:
        """Start from other factors of the same shapes; B stays as it is if not given."""
        for own, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            if own is not None and value is not None:
                own.copy_(value)

    def difference(self) -> tuple[Tensor, Tensor]:
        """Factors of B A - B_0 A_0: down (r or 2r, in), up (out, r or 2r)."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], dim=1)


@runtime_checkable
class Begins(Protocol):
    """A graft whose factors can be given another start: `StartedFactors`, or experts of them."""

    def begin(self, a: Tensor, b: Tensor | None = None) -> None:
        """Start from other factors of the same shapes; B stays as it is if not given."""


def started(tuned: Tuned, name: str) -> dict[str, Begins]:
    """The grafts of an adapter that hold such factors, by path of their sites."""
    grafts: dict[str, nn.Module] = {p: site.grafts[name] for p, site in tuned.sites.items() if name in site.grafts}
    return {path: graft for path, graft in grafts.items() if isinstance(graft, Begins)}
