from __future__ import annotations

import numpy as np

from pegbox.data.shingles import hashed, runs, words


def test_words_in_every_script() -> None:
    assert words("Don't  STOP—“now”, naïve ﬁsh_2!") == ["don", "t", "stop", "now", "naïve", "fish", "2"]
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs are no gaps
    assert words("你好,world 世界") == ["你", "好", "world", "世", "界"]
    assert words("\ud800 ...") == []


def test_runs_are_equal_where_the_words_are() -> None:
    some = ["a", "b", "c", "d", "a", "b", "c", "e"]
    found = runs(hashed(some), 3)
    same = {(i, j) for i in range(6) for j in range(i) if found[i] == found[j]}
    assert same == {(4, 0)}
    assert runs(hashed(["c", "b", "a"]), 3)[0] != runs(hashed(["a", "b", "c"]), 3)[0]
    assert runs(hashed(["a"]), 3).shape == (0,)
    assert hashed(["pegbox"]).tolist() == [18399029428254322649], "the same on every machine"
    assert found.dtype == np.uint64
