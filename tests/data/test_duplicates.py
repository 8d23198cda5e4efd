from __future__ import annotations

import random

from pegbox.data.duplicates import ALIKE, NearDuplicates

WORDS = [f"word{i}" for i in range(500)]


def sentence(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def resemblance(a: list[str], b: list[str]) -> float:
    first, second = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a, b))
    return len(first & second) / len(first | second)


def test_found_is_what_the_full_count_finds() -> None:
    for seed in range(40):
        old = sentence(seed)
        new = old.copy()
        for place in random.Random(seed).sample(range(60), seed % 8):
            new[place] = "other"
        near = NearDuplicates()
        assert near.add("old", " ".join(old)) is None
        found = near.add("new", " ".join(new).upper())
        assert (found == "old") == (resemblance(old, new) >= ALIKE), seed


def test_different_and_short_texts_are_left_alone() -> None:
    near = NearDuplicates()
    assert [near.add(str(i), " ".join(sentence(i))) for i in range(200)] == [None] * 200
    assert near.add("short", "only a few words") is None
    assert near.find("only a few words") is None
    assert near.find(" ".join(sentence(7))) == "7"
    assert len(near) == 200
