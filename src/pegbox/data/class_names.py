"""Class names that a `datasets` table keeps beside its integers, put back into the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def named(rows: Iterable[dict[str, Any]], features: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Replace the integers of `ClassLabel` columns (and lists of them) by names; -1, unlabelled, becomes None."""
    names = {column: found for column, feature in (features or {}).items() if (found := _names(feature))}
    if not names:
        yield from rows
        return
    for row in rows:
        yield row | {column: _name(row.get(column), known) for column, known in names.items()}


def _names(feature: Any) -> list[str]:
    import datasets

    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _names(feature.feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else []


def _name(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
