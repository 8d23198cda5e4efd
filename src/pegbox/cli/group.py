"""A group of verbs that answers an unknown one with the nearest, and how verbs take settings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from pegbox.core.errors import SettingsError, did_you_mean

# A verb's words are `key=value`, and its help is made of its settings: see pegbox.cli.verb.
OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Verbs(TyperGroup):
    """A group that answers an unknown verb with the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            shown = [n for n, command in self.commands.items() if not command.hidden]
            raise SettingsError(f"unknown verb {name!r}{did_you_mean(name, shown, most=20)}")
        return super().resolve_command(ctx, args)
