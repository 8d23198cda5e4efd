"""Texts that are nearly the same: MinHash over word triples (Broder 1997, "On the resemblance and containment of
documents"), candidates by banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4), then counted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pegbox.data.identity import normalised

BANDS, ROWS = 16, 4  # two texts that share 0.8 of their triples meet in a band with probability 0.9998
ALIKE = 0.8  # share of word triples from which two texts count as near duplicates
LEAST_WORDS = 8  # shorter texts have too few triples to compare
MOST_WORDS = 2000  # of a longer text, so many words are compared
MOST_RIVALS = 8  # earlier texts of a band that a text is compared with

Hashes = NDArray[np.uint64]


@dataclass
class NearDuplicates:
    """Texts seen so far; memory is about 8 bytes for each different triple of words."""

    _shingles: dict[str, Hashes] = field(default_factory=dict)
    _bands: dict[tuple[int, bytes], list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, key: str, text: str) -> str | None:
        """Remember a text; the key of an earlier one it nearly repeats, or None."""
        shingles = _triples(text)
        if shingles is None:
            return None
        bands = _signature(shingles)
        rival = self._rival(shingles, bands)
        self._shingles[key] = shingles
        for band in bands:
            self._bands.setdefault(band, []).append(key)
        return rival

    def find(self, text: str) -> str | None:
        """The key of a remembered text that this one nearly repeats, or None."""
        shingles = _triples(text)
        return None if shingles is None else self._rival(shingles, _signature(shingles))

    def _rival(self, shingles: Hashes, bands: list[tuple[int, bytes]]) -> str | None:
        keys = dict.fromkeys(key for band in bands for key in self._bands.get(band, [])[:MOST_RIVALS])
        return next((key for key in keys if _resemblance(shingles, self._shingles[key]) >= ALIKE), None)


def _triples(text: str) -> Hashes | None:
    """Hashes of the different word triples, sorted; None for a text too short to compare."""
    words = normalised(text).split()[:MOST_WORDS]
    if len(words) < LEAST_WORDS:
        return None
    hashes = {zlib.crc32(" ".join(words[i : i + 3]).encode("utf-8", "replace")) for i in range(len(words) - 2)}
    return np.fromiter(sorted(hashes), dtype=np.uint64, count=len(hashes))


def _signature(shingles: Hashes) -> list[tuple[int, bytes]]:
    generator = np.random.default_rng(0)  # the same functions for every text
    scale = generator.integers(2**63, dtype=np.uint64, size=(BANDS * ROWS, 1)) * np.uint64(2) + np.uint64(1)
    shift = generator.integers(2**63, dtype=np.uint64, size=(BANDS * ROWS, 1))
    smallest = (scale * shingles[None, :] + shift).min(axis=1)  # (BANDS * ROWS, T) -> (BANDS * ROWS,)
    return [(i, smallest[i * ROWS : (i + 1) * ROWS].tobytes()) for i in range(BANDS)]


def _resemblance(a: Hashes, b: Hashes) -> float:
    shared = np.intersect1d(a, b, assume_unique=True).size
    return float(shared / (a.size + b.size - shared))
