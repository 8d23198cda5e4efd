from __future__ import annotations

from pegbox.pretrain.contamination import held_out

WORDS = [f"word{i}" for i in range(40)]


def test_thirteen_words_in_a_row() -> None:
    index = held_out([" ".join(WORDS[:20]), "too short to be told"], 13)
    shared = "Before. " + ", ".join(WORDS[3:16]).upper() + "; after"
    assert index.shares(shared)
    assert not index.shares("Before. " + " ".join(WORDS[3:15]) + " after")
    assert not index.shares("too short to be told")
    assert not index.shares("")


def test_nothing_held_out() -> None:
    assert not held_out([], 13).shares(" ".join(WORDS))
