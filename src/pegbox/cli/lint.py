"""Whether a command line is one that Pegbox takes, without running it; the docs' examples are held to this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pegbox.core.errors import SettingsError


def check_command(words: Sequence[str]) -> None:
    """Raise unless the words after `pegbox` name a verb and settings that it has; files need not exist.

    Raises:
        SettingsError: an unknown verb, setting or option, or a wrong value.
    """
    import typer

    from pegbox.cli.app import USAGE_ERRORS, app
    from pegbox.cli.verb import HELP

    if any(word in HELP for word in words):
        words = [word for word in words if word not in HELP]
    try:
        _check(typer.main.get_command(app), "pegbox", list(words))
    except USAGE_ERRORS as error:
        raise SettingsError(error.format_message()) from error


def _check(command: Any, name: str, words: list[str]) -> None:
    from typer.core import TyperGroup

    from pegbox.cli.overrides import is_recipe

    if isinstance(command, TyperGroup):
        if not words or words[0].startswith("-"):
            return
        with command.make_context(name, words, resilient_parsing=True) as context:
            inner, found, rest = command.resolve_command(context, words)
        _check(found, f"{name} {inner}", list(rest))
        return
    with command.make_context(name, words) as context:
        verb = settings_verbs().get(name.removeprefix("pegbox "))
        if verb is not None and context.args:
            recipe = is_recipe(context.args[0])
            verb.built(context.args[int(recipe) :], complete=not recipe)


def settings_verbs() -> dict[str, Any]:
    """Every verb that takes `key=value`, by name and alias."""
    from pegbox.cli import data
    from pegbox.cli.app import ALIASES, SETTINGS_VERBS

    named = {module.VERB.name: module.VERB for module in SETTINGS_VERBS}
    return named | {alias: module.VERB for alias, module in ALIASES.items()} | {data.VERB.name: data.VERB}
