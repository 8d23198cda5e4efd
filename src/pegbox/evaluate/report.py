"""What a comparison of models found: per probe, per pair of models, and all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pegbox.core.errors import ParityError
from pegbox.core.storage import Drifts


@dataclass(frozen=True)
class Difference:
    """Two models on one probe.

    Attributes:
        largest: largest absolute difference of the outputs.
        scale: largest absolute output of the reference.
        mean_kl, max_kl: over positions, in nats; None where outputs are no logits.
        top1: share of positions with the same arg max; None where outputs are no logits.
        positions: how many there are.
    """

    probe: str
    largest: float
    scale: float
    mean_kl: float | None
    max_kl: float | None
    top1: float | None
    positions: int


@dataclass(frozen=True)
class Pair:
    """Two models on all probes.

    Attributes:
        tolerance: of the relative difference; None for a pair that is shown and not judged.
        tensors: names of the tensors whose bits differ, where they must not.
        sites: relative difference of each tuned module's own outputs, on the same inputs; at most half the tolerance.
    """

    reference: str
    other: str
    tolerance: float | None
    probes: tuple[Difference, ...]
    tensors: tuple[str, ...] = ()
    sites: Mapping[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        return worst(d.largest for d in self.probes)

    @property
    def relative(self) -> float:
        scale = worst(d.scale for d in self.probes)
        return self.largest / scale if scale else self.largest

    @property
    def mean_kl(self) -> float | None:
        """Over all positions of all probes."""
        known = [(d.mean_kl, d.positions) for d in self.probes if d.mean_kl is not None]
        return sum(kl * n for kl, n in known) / sum(n for _, n in known) if known else None

    @property
    def max_kl(self) -> float | None:
        known = [d.max_kl for d in self.probes if d.max_kl is not None]
        return worst(known) if known else None

    @property
    def top1(self) -> float | None:
        known = [(d.top1, d.positions) for d in self.probes if d.top1 is not None]
        return sum(share * n for share, n in known) / sum(n for _, n in known) if known else None

    @property
    def passed(self) -> bool:
        if self.tolerance is None:
            return True
        return self.relative <= self.tolerance and not self.tensors and not self.bad_sites  # False for NaN

    @property
    def _site_limit(self) -> float:
        return math.inf if self.tolerance is None else self.tolerance / 2

    @property
    def bad_sites(self) -> dict[str, float]:
        """Those past half the tolerance, the worst first."""
        bad = {path: value for path, value in self.sites.items() if not value <= self._site_limit}
        return dict(sorted(bad.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1], reverse=True))

    def to_dict(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("largest", "relative", "mean_kl", "max_kl", "top1", "passed")}
        return asdict(self) | numbers

    def describe(self) -> str:
        """Why it failed, with the numbers."""
        if self.tensors:
            first = ", ".join(self.tensors[:3])
            more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
            return f"{self.other} has other values than {self.reference} in {len(self.tensors)} tensors: {first}{more}"
        where = ""
        if bad := self.bad_sites:
            path, most = next(iter(bad.items()))
            count = f"{len(bad)} of {len(self.sites)} modules differ by themselves"
            where = f"; {count}, most {path}, by {number(most)} (at most {number(self._site_limit)} allowed)"
        return (
            f"{self.other} differs from {self.reference}: largest difference {number(self.largest)}, "
            f"{number(self.relative)} of the largest output (at most {number(self.tolerance)} allowed), mean KL "
            f"{number(self.mean_kl)} nats, top-1 agreement {share(self.top1)}, "
            f"worst on probe {self._worst_probe()!r}{where}"
        )

    def _worst_probe(self) -> str:
        return max(self.probes, key=lambda d: math.inf if math.isnan(d.largest) else d.largest).probe


@dataclass(frozen=True)
class Moved:
    """Matrices that are not what they were in training, and how far off they are.

    Attributes:
        what: which, and why; a sentence that ends in the numbers.
        by: relative distances.
    """

    what: str
    by: Drifts

    def to_dict(self) -> dict[str, Any]:
        numbers = {"mean": self.by.mean, "largest": self.by.largest, "worst": self.by.worst}
        return {"what": self.what, **numbers, "matrices": dict(self.by.of)}

    def __str__(self) -> str:
        return f"{self.what} {self.by}."


@dataclass(frozen=True)
class ParityReport:
    """Every pair of models that was compared.

    Attributes:
        dtype: of the weights that were compared, the coarsest.
        notes: what a reader must know to trust the numbers.
        moved: what is not as it was in training.
    """

    pairs: tuple[Pair, ...]
    dtype: str
    notes: tuple[str, ...] = ()
    moved: tuple[Moved, ...] = ()

    @property
    def passed(self) -> bool:
        return all(pair.passed for pair in self.pairs)

    def require(self) -> ParityReport:
        """Itself.

        Raises:
            ParityError: a pair is past its tolerance; the message names the numbers.
        """
        if not self.passed:
            raise ParityError("; ".join(pair.describe() for pair in self.pairs if not pair.passed))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `parity.json` holds this."""
        pairs = [pair.to_dict() for pair in self.pairs]
        moved = [moved.to_dict() for moved in self.moved]
        said = {"passed": self.passed, "dtype": self.dtype, "notes": list(self.notes)}
        return said | ({"moved": moved} if moved else {}) | {"pairs": pairs}

    def markdown(self) -> str:
        """A table, one pair a line, what has moved, and the notes."""
        head = "| compared | largest difference | relative | allowed | mean KL | max KL | top-1 | worst module |"
        lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for p in self.pairs:
            cells = [number(v) for v in (p.largest, p.relative, p.tolerance, p.mean_kl, p.max_kl)]
            cells += [share(p.top1), number(worst(p.sites.values()) if p.sites else None)]
            lines.append(f"| {p.reference} / {p.other} | {' | '.join(cells)} |")
        return "\n".join([*lines, *(f"\n{said}" for said in (*self.moved, *self.notes))])


def worst(values: Iterable[float]) -> float:
    """The largest, NaN if any is; 0 of none."""
    listed = list(values)
    return math.nan if any(math.isnan(v) for v in listed) else max(listed, default=0.0)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"
