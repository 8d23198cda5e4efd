"""Texts as hashes of runs of words: what near duplicates, leaks and repetition are counted in."""

from __future__ import annotations

import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts that put no spaces between words: Thai and Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial; odd, so that no word is lost to the modulus 2**64


class _Spelling(dict[int, str]):
    """What a character becomes in words, by its code point; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        kind = unicodedata.category(sign)[0]
        if kind not in "LMN":
            spelt = " "
        else:
            spelt = f" {sign} " if kind == "L" and _unspaced(code) else sign
        self[code] = spelt
        return spelt


def _unspaced(code: int) -> bool:
    return any(ord(first) <= code <= ord(last) for first, last in zip(UNSPACED[::3], UNSPACED[2::3], strict=True))


_SPELLING = _Spelling()


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, with case and Unicode spelling evened out; a letter of a script without
    spaces is a word of its own."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_SPELLING).split()


def hashed(words: list[str]) -> Hashes:
    """(W,) one hash a word; the same on every machine."""
    sums = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return _mixed(np.fromiter(sums, dtype=np.uint64, count=len(words)))


def runs(hashes: Hashes, length: int) -> Hashes:
    """(W,) hashes of words -> (W - length + 1,) hashes of runs of `length` words; none of fewer words."""
    count = max(len(hashes) - length + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(length if count else 0):
        total = total * BASE + hashes[offset : offset + count]
    return _mixed(total)


def _mixed(hashes: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
