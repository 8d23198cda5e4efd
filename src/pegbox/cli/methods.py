"""pegbox methods"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show this method: equation, settings, traits; peft lists HF PEFT's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything the registry knows, as JSON.")] = False,
) -> None:
    """List the methods, or show one."""
    from pegbox.catalogue import describe, summary_table, text
    from pegbox.methods import names

    if as_json:
        chosen = [name] if name else names()
        entries = [describe(n) for n in chosen]
        print(json.dumps(entries[0] if name else entries, indent=2))
    elif name in ("peft", "peft:"):
        from pegbox.catalogue import bridge_table
        from pegbox.cli.console import console

        console().print(bridge_table())
    elif name:
        print(text(name))
    else:
        from pegbox.cli.console import console

        console().print(summary_table())
        print("and HF PEFT's own tuners as peft:NAME, where PEFT is installed: pegbox methods peft")
