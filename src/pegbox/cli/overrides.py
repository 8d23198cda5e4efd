"""`recipe.yaml key=value --key value` to plain values, the later winning."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pegbox.core.errors import SettingsError

YAML = (".yaml", ".yml")


def setting_of_a_run(key: str) -> str:
    """Our name for a setting of a run that another tool may call otherwise."""
    from pegbox.train.settings import ALIASES

    return ALIASES.get(key, key)


def parse(
    words: Sequence[str],
    *,
    ours: Callable[[str], str] = setting_of_a_run,
    texts: Container[str] = (),
    subject: Callable[[str], str] | None = None,
    example: str = "model=... data=... method=lora",
) -> dict[str, Any]:
    """Settings from the words of a command line.

    A first word that ends in .yaml or .yml is a file of settings; `key=value`, `--key=value` and `--key value` follow
    and win.  Values are read as YAML, so that lists and numbers need no quoting.

    Args:
        ours: our name for a key: what comes later under one spelling replaces what came before under another.
        texts: our names of settings that are text, whatever YAML would read in it (`prompt=Question: why?`).
        subject: gives the setting that a bare word before all others means, a folder say; there is none if None.
        example: words of the right form, for an error.

    Raises:
        SettingsError: a word of another form, or a file that is missing or is not a mapping.
    """
    values: dict[str, Any] = {}

    def put(key: str, text: str) -> None:
        for other in [k for k in values if k != key and ours(k) == ours(key)]:
            del values[other]
        value = scalar(text)
        values[key] = value if value is None or ours(key) not in texts or isinstance(value, str) else text

    rest = list(words)
    if rest and is_recipe(rest[0]):
        values |= read_yaml(Path(rest.pop(0)))
    if rest and subject and "=" not in rest[0] and not rest[0].startswith("-"):
        put(subject(rest[0]), rest.pop(0))
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            key = key.removeprefix("--").replace("-", "_")
            if not equals:
                value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        elif not equals:
            raise SettingsError(f"expected key=value, got {word!r}, as in `{example}`")
        put(key, value)
    return values


def is_recipe(word: str) -> bool:
    """Whether a word names a file of settings."""
    return "=" not in word and word.endswith(YAML)


def folder_of(words: Sequence[str]) -> Path:
    """The folder of the recipe that comes first; the current one where none does, or one that ships with Pegbox."""
    path = Path(words[0]) if words and is_recipe(words[0]) else Path()
    return path.parent if path.is_file() else Path()


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings; where there is none of this name, the one that ships with Pegbox."""
    if not path.is_file():
        from pegbox.recipes.shipped import recipes

        if str(path) not in recipes():
            raise SettingsError(f"there is no recipe {str(path)!r}; shipped ones: {', '.join(recipes())}")
        path = recipes()[str(path)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
