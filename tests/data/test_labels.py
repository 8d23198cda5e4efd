from __future__ import annotations

import pytest

from pegbox.data.labels import learn, truth
from pegbox.data.rejects import RowError


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        (["pos", "neg"], "classification", ["pos", "neg"]),
        ([1, 0], "classification", [1, 0]),
        (["1", "0"], "classification", [1, 0]),
        ([True, False], "classification", [1, 0]),
        (["1", "0", "other"], "classification", ["1", "0", "other"]),
        ([["a", "b"], []], "classification", [["a", "b"], []]),
        ([3, 4.5], "regression", [3.0, 4.5]),
        (["3", "4.5"], "regression", [3.0, 4.5]),
    ],
)
def test_the_type_is_that_of_the_column(values: list[object], kind: str, read: list[object]) -> None:
    found, reader = learn(values)
    assert (found, [reader(value) for value in values]) == (kind, read)


@pytest.mark.parametrize(
    ("column", "label", "why"),
    [
        ([1, 0, 1], "pos", "label is not a class number: found 'pos'"),
        ([1, 0, 1], None, "label is missing"),
        (["a", "b"], "", "label is missing"),
        (["a", "b"], {"x": 1}, "label is not a class name"),
        ([1.5, 2.5], float("nan"), "label is not a number"),
        ([1.5, 2.5], "high", "label is not a number"),
    ],
)
def test_a_row_of_another_type_is_refused(column: list[object], label: object, why: str) -> None:
    with pytest.raises(RowError, match=why):
        learn(column)[1](label)


def test_truth() -> None:
    assert [truth(value) for value in (True, "true", 1, "False", 0)] == [True, True, True, False, False]
    with pytest.raises(RowError, match="label is not true or false: found 'maybe'"):
        truth("maybe")
