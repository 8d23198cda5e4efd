"""Every check there is, by name, in the order in which they run."""

from __future__ import annotations

from pegbox.checks import (
    beginning,
    compiling,
    composing,
    copying,
    declaring,
    equation,
    generating,
    interchange,
    learning,
    leaving,
    merging,
    mixing,
    precision,
    saving,
)
from pegbox.checks.check import Check

THEMES = (
    declaring,
    beginning,
    learning,
    leaving,
    equation,
    merging,
    saving,
    composing,
    mixing,
    precision,
    compiling,
    copying,
    generating,
    interchange,
)

CHECKS: dict[str, Check] = {c.name: c for theme in THEMES for c in vars(theme).values() if isinstance(c, Check)}
