"""`recipe.yaml key=value --key value` to plain values, the later winning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pegbox.core.errors import SettingsError

YAML = (".yaml", ".yml")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Settings from the words of a command line.

    A first word that ends in .yaml or .yml is a file of settings; `key=value`, `--key=value` and `--key value` follow
    and win.  Values are read as YAML, so that lists and numbers need no quoting.

    Raises:
        SettingsError: a word of another form, or a file that is missing or is not a mapping.
    """
    values: dict[str, Any] = {}
    rest = list(words)
    if rest and rest[0].endswith(YAML) and "=" not in rest[0]:
        values |= read_yaml(Path(rest.pop(0)))
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            key = key.removeprefix("--").replace("-", "_")
            if not equals:
                value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        elif not equals:
            raise SettingsError(f"expected key=value, got {word!r}, as in `model=... data=... method=lora`")
        _drop_other_spelling(values, key)
        values[key] = scalar(value)
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings; where there is none of this name, the one that ships with Pegbox."""
    if not path.is_file():
        from pegbox.recipes.shipped import recipes

        if str(path) not in recipes():
            raise SettingsError(f"there is no recipe {str(path)!r}; shipped ones: {', '.join(recipes())}")
        path = recipes()[str(path)]
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise SettingsError(f"{path} must hold `key: value` lines, it holds {type(content).__name__}")
    return {str(k): v for k, v in content.items()}


def scalar(text: str) -> Any:
    """A value as YAML reads it; text that is not YAML stays text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text not in ("null", "none", "~") else value


def _drop_other_spelling(values: dict[str, Any], key: str) -> None:
    """What the command line says under one name replaces what the file said under another."""
    from pegbox.train.settings import ALIASES

    ours = ALIASES.get(key, key)
    for other in [k for k in values if k != key and ALIASES.get(k, k) == ours]:
        del values[other]
