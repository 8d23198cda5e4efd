"""Labels of one type: what a column of labels holds is read off all its rows, then every row is held to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from pegbox.data.rejects import RowError

Reader = Callable[[Any], Any]

TRUTH = {"true": True, "1": True, "false": False, "0": False}


def learn(values: Iterable[Any]) -> tuple[str, Reader]:
    """`classification` or `regression`, and how to read one label.

    Names stay names, whole numbers are class numbers (also when written as text, as in CSV), other numbers are
    regression targets; a list of names or class numbers is a multi-label row.
    """
    there = [
        item
        for value in values
        for item in (value if isinstance(value, list) else [value])
        if item is not None and item != ""
    ]
    native = [item for item in there if isinstance(item, (int, float))]
    if 2 * len(native) > len(there):  # typed numbers; a stray word among them is a broken row, not a class
        if any(isinstance(item, float) for item in native):
            return "regression", _number
        return "classification", _many(_class_number)
    if there and all(_reads(item, int) for item in there):
        return "classification", _many(_class_number)
    if there and all(_reads(item, float) for item in there):
        return "regression", _number
    return "classification", _many(_class_name)


def truth(value: Any) -> bool:
    """A wanted / unwanted flag: true, false, 1, 0."""
    known = TRUTH.get(str(value).strip().lower())
    if known is None:
        raise RowError("label is missing" if value is None else "label is not true or false", f"found {value!r}")
    return known


def _reads(value: Any, kind: Callable[[Any], Any]) -> bool:
    try:
        kind(value)
    except (TypeError, ValueError):
        return False
    return True


def _many(one: Reader) -> Reader:
    return lambda value: [one(item) for item in value] if isinstance(value, list) else one(value)


def _class_number(value: Any) -> int:
    if value is None or value == "":
        raise RowError("label is missing")
    if not _reads(value, int) or isinstance(value, float):
        raise RowError("label is not a class number", f"found {value!r} where the others are whole numbers")
    return int(value)


def _class_name(value: Any) -> str:
    if value is None or value == "":
        raise RowError("label is missing")
    if not isinstance(value, (str, int, float)):
        raise RowError("label is not a class name", f"found {type(value).__name__}")
    return str(value)


def _number(value: Any) -> float:
    if value is None or value == "":
        raise RowError("label is missing")
    if not _reads(value, float) or not math.isfinite(float(value)):
        raise RowError("label is not a number", f"found {value!r} where the others are numbers")
    return float(value)
