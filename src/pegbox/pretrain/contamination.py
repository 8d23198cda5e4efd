"""Which texts share a run of words with a held-out one.

After Brown et al., "Language Models are Few-Shot Learners", 2020 (arXiv 2005.14165), appendix C, whose runs are of 13
words. Words are compared without case and punctuation; held-out texts of fewer words cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pegbox.data.shingles import Hashes, hashed, runs, words


@dataclass(frozen=True)
class HeldOut:
    """Runs of `length` words of held-out texts, as hashes: (R,) sorted, 8 bytes each."""

    length: int
    hashes: Hashes

    def shares(self, text: str) -> bool:
        """Whether a text has one of the runs."""
        own = runs(hashed(words(text)), self.length)
        at = np.searchsorted(self.hashes, own)
        inside = at < len(self.hashes)
        return bool(np.any(self.hashes[at[inside]] == own[inside]))


def held_out(texts: Iterable[str], length: int) -> HeldOut:
    """The index of some texts."""
    found = [np.unique(runs(hashed(words(text)), length)) for text in texts]
    return HeldOut(length, np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64))
