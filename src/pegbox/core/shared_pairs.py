"""Low-rank factors that several sites of an adapter share: one A and one B, trained, counted and saved once.

W_i' = W_i + s_i B A        A: (r, in)   B: (out, r), zero at the start; every W_i is (out, in)
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from pegbox.core.graft import LowRankGraft, low_rank_pair
from pegbox.core.low_rank import Down
from pegbox.core.low_rank_start import LowRankMethod
from pegbox.core.method import Anatomy
from pegbox.core.site import Site


class Pair(nn.Module):
    """A and B, as LoRA starts them."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.a, self.b = low_rank_pair(site, rank)


class Pairs(nn.Module):
    """What `Method.shared` gives: the pairs by name, each made when the first site asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict()

    def at(self, site: Site, group: str, rank: int) -> Pair:
        """That of a group's sites of one shape and rank."""
        out, in_ = site.shape
        key = f"{group}-{out}x{in_}-{rank}".replace(".", "/")
        if key not in self.pairs:
            self.pairs[key] = Pair(site, rank)
        pair = self.pairs[key]
        assert isinstance(pair, Pair)
        return pair


class SharedGraft(LowRankGraft):
    """The update by a pair that other sites have too.

    The pair is a part of each graft, and an adapter knows it under its name among what is shared.
    """

    def __init__(self, pair: Pair, site: Site, method: LowRankMethod, b_rate: float = 1.0) -> None:
        super().__init__()
        self.pair, self.b_rate = pair, b_rate
        self.scale, self.dropout = method.factor_at(site.path), method.dropout

    def factors(self) -> tuple[Down, Tensor, float]:
        return self.pair.a, self.pair.b, self.scale

    def rates(self) -> dict[str, float]:
        return {"pair.b": self.b_rate}


def type_of(path: str, anatomy: Anatomy) -> str:
    """A site's role; where it has none, its path without the numbers."""
    role = next((role for role, paths in anatomy.roles().items() if path in paths), None)
    return role or re.sub(r"\b\d+\b", "", path)
