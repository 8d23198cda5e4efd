"""Whether a text is running text in the wanted language.

Rules and numbers of Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", 2021
(arXiv 2112.11446), appendix A1.1, and Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", 2019 (arXiv 1910.10683), section 2.2. Where books fail a rule for no fault of theirs, it
departs:

- repeated lines: those of fewer than four words (names of speakers, refrains) are not counted, and only lines are;
- bullets and ellipses: not looked for in texts of fewer than five lines;
- braces: C4 drops a page with one, here more than one in 200 characters do it, as editors set notes in braces;
- length: `least` and `most` say it, in characters, instead of 50 to 100 000 words; of fewer than 100, neither
  repetition, common words nor words without a letter are looked for;
- letters: marks set apart by spaces are no words (80 % of the words have a letter), and 60 % of all signs are letters;
- scripts without spaces, and Hangul, have no rule of word length; the rule of English words is for English alone.

Languages are told apart by py3langid, after Lui and Baldwin, "langid.py", 2012.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pegbox.core.errors import MissingExtra, SettingsError, did_you_mean
from pegbox.data.identity import normalised
from pegbox.data.shingles import UNSPACED, Hashes, hashed, runs
from pegbox.data.shingles import words as words_of
from pegbox.pretrain.settings import CleanSettings

Lengths = NDArray[np.int64]

COMMON = {"the", "be", "to", "of", "and", "that", "have", "with"}  # two of them are in any English text
LETTERS = re.compile(f"[{UNSPACED}]")
SOLID = re.compile(f"[{UNSPACED}\uac00-\ud7af]")  # scripts whose words are short or not told apart
LOOKED = 2000  # characters of the middle of a text that its language is told from
LEAST_LINES = 5  # of fewer, no share says anything
LEAST_WORDS = 100  # fewer may well say a phrase twice (verse does), or do without the common words
LETTERS_A_WORD = 2  # of scripts without spaces; a run of words is one of so many letters
LINE_WORDS = 4  # shorter lines are not counted as repeated

# Runs of words -> the share of all characters that the most frequent run, or repeated runs, may make up.
MOST_FREQUENT = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def judge(text: str, settings: CleanSettings) -> str | None:
    """The reason to drop a text, or None.

    Raises:
        MissingExtra: a language is asked for and py3langid is not installed.
        SettingsError: py3langid does not know the language.
    """
    if settings.language is not None:
        check_language(settings.language)
        found = language(text)
        if found != settings.language:
            return f"language {found}"
    page = Page(text)
    if settings.quality:
        rules = RULES | (ENGLISH if settings.language == "en" else {})
        fault = next((reason for reason, broken in rules.items() if broken(page)), None)
        if fault:
            return fault
    return "repeated lines" if page.repeated_lines > settings.repeats else None


@dataclass(frozen=True)
class Page:
    """A text as the rules see it."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces."""
        return self.text.split()

    @cached_property
    def all_words(self) -> list[str]:
        """What is told apart in any script, without punctuation."""
        return words_of(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def unspaced(self) -> bool:
        """Mostly in a script without spaces, of which every letter counts as a word."""
        return len(LETTERS.findall(self.text)) > 0.2 * len(self.text)

    @cached_property
    def solid(self) -> bool:
        """Mostly in a script that has no rule of word length."""
        return len(SOLID.findall(self.text)) > 0.2 * len(self.text)

    @property
    def repeated_lines(self) -> float:
        """Share of lines that occurred before, of those of four words and more."""
        lines = [line for line in map(normalised, self.lines) if len(words_of(line)) >= LINE_WORDS]
        return 1 - len(set(lines)) / len(lines) if lines else 0.0

    def share_of_lines(self, test: Callable[[str], bool]) -> float:
        """0 of a text of few lines: a page of a book is often a paragraph or two."""
        return sum(map(test, self.lines)) / len(self.lines) if len(self.lines) >= LEAST_LINES else 0.0


def _word_length(page: Page) -> bool:
    mean = sum(map(len, page.words)) / max(len(page.words), 1)
    return not page.solid and not 3 <= mean <= 10


def _symbols(page: Page) -> bool:
    """Hashes, but for those of headings, or ellipses, to more than a tenth of the words."""
    most = 0.1 * len(page.words)
    return (
        len(re.findall(r"(?<![\n#])#", f"\n{page.text}")) > most
        or len(re.findall(r"\.{3,}|(?:\. ){2,}\.|…", page.text)) > most
    )


def _few_letters(page: Page) -> bool:
    signs = "".join(page.words)
    if sum(sign.isalpha() or unicodedata.category(sign)[0] == "M" for sign in signs) < 0.6 * len(signs):
        return True
    words = page.all_words
    return len(words) >= LEAST_WORDS and sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words)


def _repetition(page: Page) -> bool:
    words = page.all_words
    if len(words) < LEAST_WORDS:
        return False
    hashes, lengths = hashed(words), np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    total, letters = int(lengths.sum()), LETTERS_A_WORD if page.unspaced else 1
    return any(_most_frequent(hashes, lengths, letters * n) > most * total for n, most in MOST_FREQUENT.items()) or any(
        _repeated(hashes, lengths, letters * n) > most * total for n, most in REPEATED.items()
    )


def _most_frequent(hashes: Hashes, lengths: Lengths, n: int) -> int:
    """Characters of the run of n words that occurs most often, times its occurrences; 0 if none occurs twice."""
    found, first, counts = np.unique(runs(hashes, n), return_index=True, return_counts=True)
    if not len(found) or counts.max() < 2:
        return 0
    often = int(counts.argmax())
    return int(lengths[first[often] : first[often] + n].sum() * counts[often])


def _repeated(hashes: Hashes, lengths: Lengths, n: int) -> int:
    """Characters of words that lie in a run of n words that was there before, each counted once."""
    first = np.unique(runs(hashes, n), return_index=True)[1]
    again = np.ones(max(len(hashes) - n + 1, 0), dtype=bool)
    again[first] = False
    covered = np.zeros(len(hashes), dtype=bool)
    for offset in range(n if len(again) else 0):
        covered[offset : offset + len(again)] |= again
    return int(lengths[covered].sum())


RULES: dict[str, Callable[[Page], bool]] = {  # reason -> whether the text is no running text; the cheap ones first
    "placeholder text": lambda page: "lorem ipsum" in page.text.casefold(),
    "braces": lambda page: page.text.count("{") > len(page.text) / 200,
    "word length": _word_length,
    "symbols": _symbols,
    "bullets": lambda page: page.share_of_lines(lambda line: line[0] in "-*+•·‣◦▪●") > 0.9,
    "ellipses": lambda page: page.share_of_lines(lambda line: line.endswith(("...", "…"))) > 0.3,
    "few letters": _few_letters,
    "repetition": _repetition,
}
ENGLISH: dict[str, Callable[[Page], bool]] = {
    "no common words": lambda page: len(page.all_words) >= LEAST_WORDS and len(COMMON & set(page.all_words)) < 2,
}


def language(text: str) -> str:
    """The ISO 639-1 code (639-3 where there is none) of the language that the middle of a text is most likely in.

    Raises:
        MissingExtra: py3langid is not installed.
    """
    start = max(0, (len(text) - LOOKED) // 2)
    return str(_identifier().classify(text[start : start + LOOKED])[0])


def check_language(code: str) -> None:
    """Raise SettingsError where no text is ever told to be in a language, MissingExtra without py3langid."""
    known = _languages()
    if code not in known:
        raise SettingsError(f"clean.language: unknown code {code!r}{did_you_mean(code, known)}")


@functools.cache
def _languages() -> frozenset[str]:
    return frozenset(code for code, _ in _identifier().rank(""))


def _identifier() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise MissingExtra("py3langid", "pretrain", "telling languages apart (clean.language)") from error
    return py3langid
