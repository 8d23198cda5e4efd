"""Dotted module paths, and the patterns over them that the data files write."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from functools import cache


def ancestry(path: str) -> list[str]:
    """`a`, `a.b` and `a.b.c`, for `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def within(path: str, roots: Container[str]) -> bool:
    """Whether `path` is one of `roots`, or lies beneath one."""
    return any(part in roots for part in ancestry(path))


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path` ends in one of `patterns`: whole components, any prefix, `*` for one block index."""
    return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    body = re.escape(pattern).replace(r"\*", r"\d+")
    return re.compile(rf"(?:.+\.)?{body}")
