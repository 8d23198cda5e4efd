"""The commands, in the order in which `pegbox --help` shows them."""

from __future__ import annotations

from typing import Any

import typer

from pegbox import __version__
from pegbox.cli import (
    chat,
    check,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    methods,
    pretrain,
    train,
    zoo,
)
from pegbox.cli.group import OVERRIDES, Verbs

# Newer versions of typer bring a click of their own, so its errors are found through the one that typer exports.
USAGE_ERRORS: tuple[type[Any], ...] = typer.BadParameter.__bases__

SETTINGS_VERBS = (train, pretrain, compare, evaluate, generate, chat, merge, export, inspect)
ALIASES = {"sft": train, "pt": train, "finetune": train, "evaluate": evaluate, "infer": generate}


app = typer.Typer(
    cls=Verbs,
    name="pegbox",
    help="Every published way to fine-tune a model, behind one registry.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pegbox {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("demo")(demo.demo)
for verb in SETTINGS_VERBS:
    app.command(verb.VERB.name, context_settings=OVERRIDES)(verb.run)
for alias, verb in ALIASES.items():
    app.command(alias, context_settings=OVERRIDES, hidden=True)(verb.run)
app.command("methods")(methods.methods)
app.command("zoo")(zoo.zoo)
app.command("check")(check.check)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)
app.command("env", hidden=True)(doctor.doctor)
