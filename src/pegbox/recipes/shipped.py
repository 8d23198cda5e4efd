"""The recipes and data that come with Pegbox."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipes() -> dict[str, Path]:
    """Shipped YAML files by name."""
    return {path.name: path for path in sorted(FOLDER.glob("*.yaml"))}


def data(name: str) -> Path:
    """The folder of a shipped data set; its NOTICE says whose it is."""
    return FOLDER / name
