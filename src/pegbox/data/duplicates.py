"""Texts that are nearly the same: MinHash over word triples (Broder 1997, "On the resemblance and containment of
documents"), candidates by banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4). Both are
datasketch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pegbox.data.shingles import Hashes, hashed, runs, words

ROWS = 4  # minima that two texts must share to meet in a band
MISSED = 1e-3  # probability that two texts just as alike as asked for meet in no band
LEAST_MINIMA = 128  # an estimate from so many is off by 0.035 (one standard deviation) at a resemblance of 0.8
ALIKE = 0.8  # share of word triples from which two texts count as near duplicates
LEAST_WORDS = 8  # shorter texts have too few triples to compare
MOST_WORDS = 2000  # of a longer text, so many words are counted
MOST_RIVALS = 256  # earlier texts that a text is compared with


@dataclass
class NearDuplicates:
    """Different texts seen so far.

    Args:
        alike: resemblance from which two texts are near duplicates: shared word triples over all of either, 0 to 1.
        counted: keep the triples (8 bytes for each different one) and count. Otherwise the resemblance is estimated
            from the minima, and whole texts are compared: about 5 kilobytes a text, however long, at 0.8.
    """

    alike: float = ALIKE
    counted: bool = True
    _known: dict[str, Any] = field(default_factory=dict)  # key -> triples, or minima
    _order: dict[str, int] = field(default_factory=dict)
    _added: int = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: str, text: str) -> str | None:
        """The key of an earlier text that this one nearly repeats; None for a new one, which is remembered."""
        triples = self._triples(text)
        if triples is None:
            return None
        sketch = self._sketch(triples)
        rival = self._rival(triples, sketch)
        if rival is None:
            self._known[key] = triples if self.counted else sketch.hashvalues
            self._order[key] = self._added = self._added + 1
            self._index.insert(key, sketch)
        return rival

    def find(self, text: str) -> str | None:
        """The key of a remembered text that this one nearly repeats, or None."""
        triples = self._triples(text)
        return None if triples is None else self._rival(triples, self._sketch(triples))

    def forget(self, key: str) -> None:
        """Take a text back; nothing where its key is not known, as that of a text too short to compare."""
        if self._known.pop(key, None) is not None:
            del self._order[key]
            self._index.remove(key)

    @cached_property
    def _index(self) -> Any:
        from datasketch import MinHashLSH

        chance = min(self.alike, 0.999) ** ROWS  # of meeting in one band
        bands = max(2, math.ceil(math.log(MISSED) / math.log1p(-chance)))
        return MinHashLSH(num_perm=max(bands * ROWS, LEAST_MINIMA), params=(bands, ROWS))

    @cached_property
    def _blank(self) -> Any:
        from datasketch import MinHash

        return MinHash(num_perm=self._index.h, hashfunc=int)

    def _triples(self, text: str) -> Hashes | None:
        """Different word triples, sorted; None for a text too short to compare."""
        found = words(text)[: MOST_WORDS if self.counted else None]
        return np.unique(runs(hashed(found), 3)) if len(found) >= LEAST_WORDS else None

    def _sketch(self, triples: Hashes) -> Any:
        sketch = self._blank.copy()
        sketch.update_batch((triples >> np.uint64(32)).tolist())
        return sketch

    def _rival(self, triples: Hashes, sketch: Any) -> str | None:
        """The earliest that is as alike as asked for."""
        keys = sorted(self._index.query(sketch), key=self._order.__getitem__)[:MOST_RIVALS]
        own = triples if self.counted else sketch.hashvalues
        alike = _resemblance if self.counted else _estimate
        return next((key for key in keys if alike(own, self._known[key]) >= self.alike), None)


def _resemblance(a: Hashes, b: Hashes) -> float:
    shared = np.intersect1d(a, b, assume_unique=True).size
    return float(shared / (a.size + b.size - shared))


def _estimate(a: Any, b: Any) -> float:
    return float(np.mean(a == b))
