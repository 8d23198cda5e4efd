from __future__ import annotations

import re

import pytest

from pegbox.anatomy.layers import layer_indices
from pegbox.core.errors import TargetError


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0-3", {0, 1, 2, 3}),
        ("0, 3,7-9", {0, 3, 7, 8, 9}),
        ("11", {11}),
        ("-1", {11}),
        ("-2", {10, 11}),
        ("-3--1", {9, 10, 11}),
        ("-3--2", {9, 10}),
        ("9--1", {9, 10, 11}),
        ("0,-1", {0, 11}),
        ("-12", set(range(12))),
    ],
)
def test_ranges(layers: str, expected: set[int]) -> None:
    assert layer_indices(layers, 12) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-12", "layers '0-12': 12 is out of range; the model has 12 blocks, 0 to 11"),
        ("-13", "layers '-13': -13 is out of range; the model has 12 blocks, 0 to 11"),
        ("5-2", "layers '5-2': the range '5-2' runs backwards, from 5 to 2"),
        ("-1-3", "the range '-1-3' runs backwards, from 11 to 3"),
        ("first", "'first' is not an index or a range; write 0-5, 0,3,7-9 or -3--1"),
        ("", "'' is not an index or a range"),
        ("0,,3", "'' is not an index or a range"),
    ],
)
def test_refusals(layers: str, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        layer_indices(layers, 12)


def test_no_blocks() -> None:
    with pytest.raises(TargetError, match="this model has no blocks to choose from"):
        layer_indices("0", 0)
