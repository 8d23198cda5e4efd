"""What the registry knows, for people and programs: `pegbox methods`, the docs table, JSON."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from pegbox import methods, peft_bridge
from pegbox.core.settings import schema

if TYPE_CHECKING:
    from rich.table import Table


def describe(name: str) -> dict[str, Any]:
    """One method as plain values: what its file says, its card, seams, traits, schema of settings and docs page."""
    cls = methods.get(name)
    title, _, body = cls.about().partition("\n\n")
    traits = dataclasses.asdict(cls.traits)
    peft = traits.pop("peft")
    return {
        "name": cls.name(),
        "title": " ".join(title.split()),
        "arxiv": arxiv[1] if (arxiv := re.search(r"arXiv:(\d{4}\.\d{4,5})", title)) else None,
        "text": body.strip("\n"),
        "card": traits.pop("card"),
        "seams": list(traits.pop("seams")),
        "traits": {**traits, "needs": list(traits["needs"]), "peft": peft and peft["kind"]},
        "aliases": sorted(a for a, (target, _) in methods.ALIASES.items() if target == cls.name()),
        "settings": schema(cls),
        "presets": {key: dataclasses.asdict(preset) for key, preset in cls.presets.items()},
        "docs": "peft.md" if peft_bridge.is_bridged(name) else f"methods/{cls.name()}.md",
    }


def bridge_table() -> Table:
    """HF PEFT's own tuners, a line each, and those that are not reached with the reason.

    Raises:
        MissingExtra: PEFT is not installed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("method", "targets", "start", "merges", "rows", "here as", box=SIMPLE_HEAD, pad_edge=False)
    for entry in peft_bridge.matrix(methods.catalogue()):
        if entry["refused"]:
            table.add_row(f"({entry['name']})", "-", "-", "-", "-", "-")
            continue
        start = "identity" if entry["identity"] else "changed"
        also = ", ".join(entry["ours"]) or "-"
        table.add_row(entry["name"], entry["targets"], start, entry["merge"], entry["per_row"], also)
    return table


def summary_table() -> Table:
    """All methods, a line each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("method", "name", "arXiv", "seams", "start", "merges", "HF PEFT")
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in table.columns:
        column.no_wrap = column.header != "seams"
    entries = {name: describe(name) for name in methods.names()}
    named = [f"{name} ({', '.join(entry['presets'])})" for name, entry in entries.items() if entry["presets"]]
    table.caption = f"presets, as method.preset=NAME, in Python preset=NAME: {'; '.join(named)}"
    for name, entry in entries.items():
        traits = entry["traits"]
        table.add_row(
            name,
            re.split(r"[:,(]", entry["title"])[0].strip(),
            entry["arxiv"] or "-",
            ", ".join(entry["seams"]),
            "identity" if traits["identity"] else "changed",
            traits["merge"],
            traits["peft"] or "-",
        )
    return table


def text(name: str) -> str:
    """One method for a terminal: its docstring, settings and traits."""
    entry = describe(name)
    lines = [entry["title"], "", entry["text"], "", "settings:"]
    for key, spec in entry["settings"]["properties"].items():
        lines.append(f"  {key} = {spec.get('default')!r}  {spec.get('description', '')}")
    if entry["presets"]:
        lines += ["", "presets (method.preset=NAME, in Python preset=NAME; other settings given beside it win):"]
    for key, preset in entry["presets"].items():
        chosen = ", ".join(f"{k}={v!r}" for k, v in preset["settings"].items())
        lines += [f"  {key}: {chosen}", f"    {preset['source']}"]
    lines += ["", "traits:"]
    lines += [f"  {key}: {value}" for key, value in entry["traits"].items()]
    lines += [f"  seams: {', '.join(entry['seams'])}", f"  docs: {entry['docs']}"]
    if entry["aliases"]:
        lines.append(f"  also called: {', '.join(entry['aliases'])}")
    return "\n".join(lines)
