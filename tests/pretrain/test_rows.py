"""Packing: every row is full and starts with <s>, and no token is lost but those counted."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest

from pegbox.pretrain.rows import Waiting, best_fit, concatenate

BOS, EOS = 0, 1


def texts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Each with tokens of its own, so that nothing can be mistaken for another's."""
    draw, made, token = random.Random(seed), [], 2
    for _ in range(count):
        size = draw.randint(0, longest)
        made.append([*range(token, token + size), EOS])
        token += size
    return made


PACKERS = pytest.mark.parametrize("pack", [partial(best_fit, buffer=7), concatenate], ids=["best_fit", "concatenate"])


@PACKERS
@pytest.mark.parametrize("longest", [3, 20, 100])
def test_every_row_is_full_and_no_token_is_lost_but_those_counted(pack, longest: int) -> None:
    given, state = texts(200, longest), Waiting()
    rows = list(pack(given, 16, BOS, waiting=state))
    assert all(len(row) == 16 and row[0] == BOS for row in rows)
    out = Counter(int(token) for row in rows for token in row if token != BOS)
    missing = Counter(token for text in given for token in text) - out
    assert not out - Counter(token for text in given for token in text), "nothing is repeated"
    assert missing.total() == state.lost < 16
    assert state.tokens == out.total() + state.lost == sum(map(len, given))
    assert state.texts == 200


@PACKERS
def test_within_a_row_a_text_runs_to_its_end_and_the_next_begins_with_s(pack) -> None:
    for row in pack(texts(100, 40), 16, BOS):
        for before, after in zip(row.tolist(), row.tolist()[1:], strict=False):
            if before == EOS:
                assert after == BOS
            elif before != BOS:
                assert after in (before + 1, EOS), "a part ends with its text or with its row"


@PACKERS
def test_it_goes_on_from_any_row_as_if_it_had_not_stopped(pack) -> None:
    given = texts(60, 50)
    whole = [row.tolist() for row in pack(given, 16, BOS)]
    for stop in range(1, len(whole)):
        state = Waiting()
        first = [row.tolist() for row in islice(pack(given, 16, BOS, waiting=state), stop)]
        kept = Waiting([piece.copy() for piece in state.pieces], state.texts, state.tokens, state.cuts)
        rest = pack(given[kept.texts :], 16, BOS, waiting=kept)
        assert first + [row.tolist() for row in rest] == whole


def test_concatenating_keeps_the_order_of_the_texts() -> None:
    rows = concatenate([[5, 6, 1], [7, 8, 9, 10, 11, 12, 13, 1], [14, 1]], 8, BOS)
    assert [row.tolist() for row in rows] == [[0, 5, 6, 1, 0, 7, 8, 9], [0, 10, 11, 12, 13, 1, 0, 14]]


def test_best_fit_divides_fewer_texts_and_never_one_that_fits_whole_while_others_do() -> None:
    given = texts(2000, 30)
    fitted, joined = Waiting(), Waiting()
    list(best_fit(given, 64, BOS, 100, fitted))
    list(concatenate(given, 64, BOS, joined))
    assert fitted.cuts < joined.cuts / 3
    exact = best_fit([[2] * 2, [3] * 7, [4] * 4], 8, BOS, 3)
    np.testing.assert_array_equal(list(exact), [[0, 3, 3, 3, 3, 3, 3, 3], [0, 4, 4, 4, 4, 0, 2, 2]])
