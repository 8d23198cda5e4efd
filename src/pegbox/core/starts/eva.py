"""EVA: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation (Paischer et al., 2024),
arXiv:2410.07170.

A = the first r_l principal directions of a layer's inputs (r_l, in), B = 0

A layer's inputs are the tokens of some batches, without padding; each direction has a share of their variance.  All
layers' directions, `rho` times rank of each, are ranked by their shares, and as many as all ranks together are kept:
a layer gets as many as it has among them, none perhaps.  alpha grows with the rank, so that the scale is the same
everywhere.  rho = 1 leaves every rank as it is.

Directions are found batch after batch (incremental PCA, centred; a subspace iteration that starts from those of the
batches before), until those that are kept turn by less than arccos tau, or `batches` have been seen.  Layers with equal
inputs share one search.  HF PEFT asks for the sign too, so that it may look at some batches more, and goes on until all
rest.  `whiten` divides each direction by the root of its singular value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pegbox.core.seeding import seeded
from pegbox.core.settings import setting
from pegbox.core.starts import Start

if TYPE_CHECKING:
    from pegbox.core.calibration import Data
    from pegbox.core.tuned import Tuned

MORE = 2  # times the directions that are wanted are iterated
PASSES, AGAIN = 3, 1  # over the first rows, from drawn directions, and over later ones, from those that are known


@dataclass(frozen=True, kw_only=True)
class EVA(Start):
    rho: float = setting(2.0, "a layer's rank is at most this times the rank that is set", at_least=1)
    tau: float = setting(0.99, "cosine of a direction with itself, a batch earlier, from which on it rests", above=0)
    batches: int = setting(64, "batches seen at most", at_least=1)
    labelled: bool = setting(False, "only tokens that are to be predicted count, as HF PEFT has it; not all of a text")
    whiten: bool = setting(False, "divide each direction by the root of its singular value")

    looks: ClassVar[bool] = True

    def look(self, tuned: Tuned, name: str, data: Data) -> None:
        from pegbox.core.low_rank_start import LowRankMethod, started

        method = tuned.adapter(name).method
        assert isinstance(method, LowRankMethod)
        ranks = {path: method.rank_at(path) for path in started(tuned, name)}
        found = self.search(tuned, data, ranks)
        given = allotted({path: of.shares for path, of in found.items()}, sum(ranks.values()))
        if given != ranks:
            alphas = {path: rank * method.alpha / method.rank for path, rank in given.items() if rank}
            tuned.remake(name, replace(method, ranks=given, alphas=alphas))
        for path, graft in started(tuned, name).items():
            graft.begin(found[path].rows(given[path], whiten=self.whiten))

    def search(self, tuned: Tuned, data: Data, ranks: Mapping[str, int]) -> dict[str, Directions]:
        """The principal directions of each site's inputs, by path.

        Args:
            ranks: by path; `rho` times as many directions are looked for.
        """
        from pegbox.core.observe import observe, tokens

        budget = sum(ranks.values())
        found: dict[str, Directions] = {}
        leaders: dict[str, str] = {}  # path to that of the site whose search it shares

        for count, batch in enumerate(data.cycle(self.batches)):
            mask = tokens(batch, labelled=self.labelled)
            seen: dict[str, str] = {}  # fingerprint of an input to the first path that has it

            def see(path: str, x: Tensor, y: Tensor, mask: Tensor | None = mask, seen: dict[str, str] = seen) -> None:
                rows = _rows(x, mask)
                if path not in leaders:
                    leaders[path] = seen.setdefault(_fingerprint(rows), path)
                if leaders[path] == path:
                    most = min(round(self.rho * ranks[path]), rows.shape[1])
                    found.setdefault(path, Directions(most, rows.shape[1], rows.device)).add(rows)

            paths = ranks if not leaders else set(leaders.values()) - self._resting(found, leaders, budget)
            observe(tuned, [batch], see, paths, most=1)
            if count and not set(leaders.values()) - self._resting(found, leaders, budget):
                break
        return {path: found[leader] for path, leader in leaders.items()}

    def _resting(self, found: Mapping[str, Directions], leaders: Mapping[str, str], budget: int) -> set[str]:
        """Sites whose directions, as many as they would get now, have come to rest."""
        given = allotted({path: found[leader].shares for path, leader in leaders.items()}, budget)
        wanted = {leader: max(given[p] for p, of in leaders.items() if of == leader) for leader in found}
        return {leader for leader, rank in wanted.items() if bool((found[leader].turned[:rank] >= self.tau).all())}


class Directions:
    """Principal directions of rows (n, d) that come in parts: Ross et al. (2008), by subspace iteration."""

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        self.count, self.seen = count, 0
        self.mean, self.scatter = torch.zeros(width, device=device), 0.0  # of all rows; summed squares about it
        self.values, self.vectors = torch.zeros(0, device=device), torch.zeros(0, width, device=device)
        self.turned = torch.zeros(count, device=device)  # cosines with those before the last part

    @property
    def shares(self) -> Tensor:
        """(count,) of the variance, each direction's."""
        found = self.values.square() / max(self.scatter, 1e-30)
        return F.pad(found, (0, self.count - len(found)))

    def rows(self, rank: int, *, whiten: bool) -> Tensor:
        """A (rank, d)."""
        a = F.pad(self.vectors[:rank], (0, 0, 0, rank - len(self.vectors[:rank])))
        roots = F.pad(self.values[:rank], (0, rank - len(self.values[:rank])), value=1.0).clamp_min(1e-12).sqrt()
        return a / roots[:, None] if whiten else a

    def add(self, rows: Tensor) -> None:
        """Take in another part; one with fewer rows than directions is left out."""
        n = len(rows)
        if n < self.count:
            return
        mean = rows.mean(0)
        parts, total = [rows - mean], self.seen + n
        between = self.seen * n / total
        self.scatter += parts[0].square().sum().item() + between * (mean - self.mean).square().sum().item()
        if self.seen:
            parts += [self.values[:, None] * self.vectors, between**0.5 * (self.mean - mean)[None]]
        stacked = torch.cat(parts)
        before = self.vectors
        with seeded(0, "directions"):
            drawn = torch.randn(stacked.shape[1], min(MORE * self.count, *stacked.shape) - len(before))
        first = torch.cat([before.T, drawn.to(before)], dim=1)
        values, vectors = leading(stacked, first, AGAIN if self.seen else PASSES)
        self.values, self.vectors = values[: self.count], vectors[: self.count]
        if self.seen:
            cosines = (before * self.vectors).sum(1).abs()
            self.turned[: len(cosines)] = cosines
        self.mean, self.seen = (self.seen * self.mean + n * mean) / total, total


def leading(rows: Tensor, first: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """The largest singular values (q,) of rows (n, d), and their directions (q, d), by subspace iteration.

    Args:
        first: (d, q), q at most n and d, what is iterated.
        passes: how often; each makes what is wanted stand out by the squares of the singular values.
    """
    basis = first
    for _ in range(passes):
        basis = torch.linalg.qr(rows.T @ torch.linalg.qr(rows @ basis).Q).Q
    _, values, turn = torch.linalg.svd(torch.linalg.qr(rows @ basis, mode="r").R)
    return values, turn @ basis.T


def allotted(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks by path: how many of a path's directions are among the `budget` of the largest shares; ties go to earlier
    paths."""
    ranked = sorted(
        ((-share, order, path) for order, (path, of) in enumerate(shares.items()) for share in of.tolist()),
    )
    given = dict.fromkeys(shares, 0)
    for _, _, path in ranked[:budget]:
        given[path] += 1
    return given


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of a layer's input that count: (n, in), float32."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)].float()
    return x.flatten(0, -2).float()


def _fingerprint(rows: Tensor) -> str:
    return hashlib.blake2b(rows.cpu().numpy().tobytes(), digest_size=16).hexdigest()
