from __future__ import annotations

import random

from pegbox.data.duplicates import NearDuplicates

WORDS = [f"word{i}" for i in range(2000)]


def test_estimates_are_near_the_count() -> None:
    """Well above the bound all are found, well below it none, in texts far longer than what is counted."""
    draw = random.Random(0)
    for share in (0.0, 0.01, 0.15, 0.5):
        near = NearDuplicates(0.8, counted=False)
        for i in range(10):
            old = draw.choices(WORDS, k=4000)
            new = [word if draw.random() >= share else "other" for word in old]
            assert near.add(f"old{i}", " ".join(old)) is None
            found = near.add(f"new{i}", " ".join(new))
            assert (found == f"old{i}") == (share < 0.05), share


def test_bounds_other_than_the_usual_one() -> None:
    draw = random.Random(1)
    old = draw.choices(WORDS, k=400)
    new = [word if i % 20 else "other" for i, word in enumerate(old)]  # 85 % of triples in each, resemblance 0.74
    assert [NearDuplicates(bound, counted=False).add("x", " ".join(old)) for bound in (0.5, 1.0)] == [None, None]
    for bound, found in ((0.4, "old"), (0.5, "old"), (0.9, None), (1.0, None)):
        near = NearDuplicates(bound, counted=False)
        near.add("old", " ".join(old))
        assert near.add("new", " ".join(new)) == found, bound
        near.forget("old")
        near.forget("never seen")
        assert near.find(" ".join(old)) is None
