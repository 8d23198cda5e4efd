"""MiSS: Matrix Shard Sharing, at first named Bone and DiSHA (Kang and Yin, 2024), arXiv:2409.15371.

    cut W (out, in) along `in` into shards of r columns and add one D (out, r) to each:

    W_i' = W_i + D        y = W x + D (x_1 + x_2 + ...)        D = 0 at the start

The last shard is shorter where r does not divide `in`.  There is no alpha.  `mini` shares D further, among groups of
outputs: only its first `mini` rows are trained, repeated out / mini times.

The paper stores D^T; here and in HF PEFT the roles are the same, PEFT keeping (r, out).  With dropout, the authors'
code drops inputs before the shards are summed; so does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pegbox.core import Down, LowRankGraft, Method, PeftLayout, Site, Traits, setting
from pegbox.core.errors import SettingsError


class MiSSGraft(LowRankGraft):
    def __init__(self, site: Site, method: MiSS) -> None:
        super().__init__()
        out, in_ = site.shape
        rows = method.mini or out
        if method.rank > in_:
            raise SettingsError(f"rank must be 1..{in_} at {site.path} (a {out} x {in_} weight), got {method.rank}")
        if out % rows:
            raise SettingsError(f"mini must divide the {out} outputs of {site.path}, got {rows}")
        self.d = nn.Parameter(torch.zeros(method.rank, rows))  # (r, out), PEFT's orientation
        self.rank, self.repeats, self.dropout = method.rank, out // rows, method.dropout

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.rank, self.d.T.repeat(self.repeats, 1), 1.0


@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    rank: int = setting(64, "columns of a shard, and of D", at_least=1)
    mini: int | None = setting(
        None, "rows of D that are trained, repeated for all outputs; all rows if none", at_least=1
    )
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)

    traits: ClassVar[Traits] = Traits(
        seams=("weight",),
        card="bone",
        linear=True,
        to_lora=True,
        peft=PeftLayout(
            "MISS",
            tensors={"d": "miss_block"},
            fields={"rank": "r", "dropout": "miss_dropout"},
            fixed={"bias": "none"},
            allowed={"init_weights": (True, False, "mini")},
        ),
    )

    def graft(self, site: Site, shared: nn.Module | None) -> MiSSGraft:
        return MiSSGraft(site, self)

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        return {"init_weights": "mini", "mini_r": self.mini} if self.mini else {"init_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"mini": config["mini_r"]} if config.get("init_weights") == "mini" else {}

    def size(self, site: Site) -> int:
        return self.rank * (self.mini or site.shape[0])
