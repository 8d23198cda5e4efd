"""Write the generated parts of the documentation; `--check` only says what is out of date."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pegbox import methods
from pegbox.catalogue import describe

DOCS = Path(__file__).parent
EFFECTS = DOCS / "results" / "effects"  # a record of each experiment: its setting, its command, its page, its tables
PEFT_CHECKS = DOCS / "results" / "peft_checks.json"
BEGIN, END = "<!-- generated from the code: do not edit below -->", "<!-- end of the generated part -->"


def main() -> int:
    stale = []
    for path, text in pages():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(DOCS)))
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale:
        print("out of date:" if "--check" in sys.argv else "written:", ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


def pages() -> Iterator[tuple[Path, str]]:
    """(file, the text it should have)"""
    for name in methods.names():
        path = DOCS / "methods" / f"{name}.md"
        yield path, method_page(name, path.read_text() if path.exists() else "")
    yield DOCS / "methods" / "index.md", methods_table()
    yield DOCS / "sites.md", sites_page()
    yield DOCS / "starts.md", starts_page()
    yield DOCS / "peft.md", peft_page((DOCS / "peft.md").read_text())
    yield DOCS / "reference" / "architectures.md", architectures_page()
    yield DOCS / "reference" / "settings.md", settings_page()
    yield DOCS / "reference" / "cli.md", command_line_page()


def method_page(name: str, old: str) -> str:
    """The hand-written head of a method's page, kept, and what the code says about it."""
    entry = describe(name)
    head = old.partition(BEGIN)[0].rstrip() or f"# {name}\n\nWhat:\n\nWhen:"
    parts = [
        head,
        BEGIN,
        "## Equation",
        entry["title"],
        "```text\n" + entry["text"] + "\n```",
        "## Settings",
        settings_table(entry["settings"]),
        *presets(entry),
        "## Traits",
        traits_table(entry),
        "## Measured effect",
        effect(name),
        "## Use",
        f"```console\npegbox train model=... data=... method={name} output=out/\n```",
        END,
    ]
    return "\n\n".join(parts) + "\n"


def settings_table(schema: Mapping[str, Any]) -> str:
    rows = [(k, v.get("default"), bounds(v), v.get("description", "")) for k, v in schema["properties"].items()]
    lines = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{k}` | `{json.dumps(d)}` | {b} | {h} |" for k, d, b, h in rows)])


def presets(entry: Mapping[str, Any]) -> list[str]:
    """A section on named settings, where a method has some."""
    if not entry["presets"]:
        return []
    lines = ["`preset=NAME` (`method.preset=NAME` of a run); settings given beside it win.", ""]
    lines += ["| preset | settings | source |", "| --- | --- | --- |"]
    for name, preset in entry["presets"].items():
        chosen = ", ".join(f"`{k}={json.dumps(v)}`" for k, v in preset["settings"].items())
        lines.append(f"| `{name}` | {chosen} | {preset['source']} |")
    return ["## Presets", "\n".join(lines)]


def bounds(spec: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{words[k]} {spec[k]}" for k in words if k in spec]
    return ", ".join(said) or " or ".join(f"`{v}`" for v in spec.get("enum", []))


def traits_table(entry: Mapping[str, Any]) -> str:
    traits = entry["traits"]
    rows = {
        "seams": ", ".join(entry["seams"]),
        "starts as the base": "yes" if traits["identity"] else "no",
        "merges into the weights": traits["merge"],
        "linear in its parameters": "yes" if traits["linear"] else "no",
        "exact as a LoRA": "yes" if traits["to_lora"] else "no",
        "leaves the base's tensors alone": "yes" if traits["keeps_base"] else "no",
        "trains its tensors in turn": "yes" if traits["in_turn"] else "no",
        "may differ per row of a batch": "yes" if traits["per_row"] else "no",
        "needs": ", ".join(traits["needs"]) or "nothing",
        "HF PEFT": f"`{traits['peft']}`, files go both ways" if traits["peft"] else "has no such file format",
        "also called": ", ".join(f"`{a}`" for a in entry["aliases"]) or "-",
    }
    rows |= {f"expected failure: {check}": why for check, why in traits["xfail"].items()}
    return "\n".join(["| trait | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def effect(name: str) -> str:
    """What the recorded experiments measured for a method."""
    records = [json.loads(path.read_text()) for path in sorted(EFFECTS.glob("*.json"))]
    told = [
        f"{r['setting']}\n\n{r['methods'][name]}\n\nMade by `{r['command']}`; all of it: [{r['page']}](../{r['page']})."
        for r in records
        if name in r["methods"]
    ]
    return "\n\n".join(told) or "Not measured yet."


def methods_table() -> str:
    lines = [
        "# Methods",
        "",
        "| method | paper | seams | start | merges | HF PEFT |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in methods.names():
        entry = describe(name)
        traits = entry["traits"]
        start = "identity" if traits["identity"] else "changed"
        seams = ", ".join(entry["seams"])
        cells = (f"[{name}]({name}.md)", entry["title"], seams, start, traits["merge"], traits["peft"] or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "As JSON, with settings and traits: `pegbox methods --json`."]) + "\n"


def peft_page(old: str) -> str:
    """The hand-written head of the page on `peft:NAME`, kept, and the matrix of PEFT's tuners."""
    from pegbox import peft_bridge

    entries = peft_bridge.matrix(methods.catalogue())
    lines = ["| method | usual targets | start | merges | per row | needs | Pegbox's own |", "| " + "--- | " * 7]
    for entry in entries:
        if entry["refused"]:
            continue
        own = ", ".join(f"[{name}](methods/{name}.md)" for name in entry["ours"]) or "-"
        start = "identity" if entry["identity"] else "changed"
        needs = ", ".join(entry["needs"]) or "-"
        cells = (f"`{entry['name']}`", entry["targets"], start, entry["merge"], entry["per_row"], needs, own)
        lines.append("| " + " | ".join(cells) + " |")
    missing = [f"- `{e['name']}`: {e['refused']}." for e in entries if e["refused"]]
    odd = [f"- `{e['name']}`, `{check}`: {why}." for e in entries for check, why in e["xfail"].items()]
    parts = [
        old.partition(BEGIN)[0].rstrip(),
        BEGIN,
        "\n".join(lines),
        "## Not reached",
        "\n".join(missing),
        "## What the conformance suite says",
        *peft_checks(),
        "## What PEFT's code does not do",
        "\n".join(odd),
        END,
    ]
    return "\n\n".join(parts) + "\n"


def peft_checks() -> list[str]:
    """What `make peft` recorded: checks of every tuner by their outcome, and where PEFT refuses it."""
    record = json.loads(PEFT_CHECKS.read_text())
    outcomes = ("pass", "not applicable", "expected failure", "fail", "unexpected pass")
    shown = [o for o in outcomes if o in outcomes[:3] or any(o in t["counts"] for t in record["tuners"].values())]
    lines = [
        "| method | " + " | ".join(shown) + " | refused by PEFT on |",
        "| --- |" + " ---: |" * len(shown) + " --- |",
    ]
    for name, tuner in record["tuners"].items():
        counts = " | ".join(str(tuner["counts"].get(outcome, 0)) for outcome in shown)
        lines.append(f"| `{name}` | {counts} | {', '.join(tuner['refused']) or '-'} |")
    told = f"Every tuner on every family of models of the suite, by `{record['command']}`, with PEFT {record['peft']}."
    bad = [f"- `{n}`, `{check}`: {why}" for n, t in record["tuners"].items() for check, why in t["bad"].items()]
    return [told, "\n".join(lines), *(["Not as declared:", "\n".join(bad)] if bad else [])]


def sites_page() -> str:
    """Every method on every kind of site and storage, as trying it out says."""
    from pegbox.checks.sites import PLACES, on_sites, outcome

    refusals: dict[str, list[str]] = {}  # what is said, to the methods that say it
    lines = [
        "# Sites",
        "",
        "Which method works on which kind of site, and on which quantised storage. Made by trying: each method is put",
        "on a small model of each kind, run forwards and backwards, merged where it merges, and taken off again, which",
        "must give back the base bit for bit. Where it refuses, the number says with what words. Methods that act on a",
        "whole model or on blocks (virtual tokens, networks beside it, skips, blocks in turn) are not here.",
        "",
        "| method | " + " | ".join(place.name for place in PLACES) + " |",
        "| --- |" + " --- |" * len(PLACES),
    ]
    for cls in on_sites():
        cells = []
        for place in PLACES:
            why = outcome(cls, place)
            cells.append("yes" if why is None else f"refused ({noted(refusals, cls.name(), why)})")
        lines.append(f"| [{cls.name()}](methods/{cls.name()}.md) | " + " | ".join(cells) + " |")
    lines += ["", *(f"{n}. {', '.join(names)}: {why}" for n, (why, names) in enumerate(refusals.items(), 1))]
    return "\n".join(lines) + "\n"


def starts_page() -> str:
    """Every start under every method with LoRA's factors, as trying it out says."""
    from pegbox.checks.starts import all_starts, low_rank_methods, outcome

    columns = all_starts()
    refusals: dict[str, list[str]] = {}
    lines = [
        "# Starts",
        "",
        "Where the factors of a low-rank update begin is apart from what is made of them: `method.start=eva` goes with",
        "DoRA, with routed experts, with ranks that grow. Made by trying: each pair is started on a small Llama (from",
        "batches, where the start looks at data), must give the base's outputs, train, come back from its file, merge",
        "where the method merges, and leave the base bit for bit as it was.",
        "",
        "| method | " + " | ".join(f"`{name}`" for name in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for cls in low_rank_methods():
        said = [outcome(cls, start) for start in columns]
        cells = ["yes" if why is None else f"refused ({noted(refusals, cls.name(), why)})" for why in said]
        lines.append(f"| [{cls.name()}](methods/{cls.name()}.md) | " + " | ".join(cells) + " |")
    lines += ["", *(f"{n}. {', '.join(names)}: {why}" for n, (why, names) in enumerate(refusals.items(), 1))]
    return "\n".join(lines).rstrip() + "\n"


def noted(refusals: dict[str, list[str]], method: str, why: str) -> int:
    """The number of a refusal among those so far, the same for all methods that say the same of themselves."""
    said = re.sub(rf"\b{method}\b", "it", why)
    names = refusals.setdefault(said, [])
    names += [method] * (method not in names)
    return list(refusals).index(said) + 1


def architectures_page() -> str:
    """What targets may name: every role, and the architectures that a data file describes."""
    from pegbox.anatomy import ROLES, tables

    files: dict[str, dict[str, tables.Table]] = {}
    for name, table in {**tables.by_model_type(), **tables.by_class()}.items():
        files.setdefault(table.source, {})[name] = table
    lines = [
        "# Architectures",
        "",
        "`targets`, `exclude` and `also_train` name modules by their role, on every architecture alike. A model that",
        "no file describes is discovered from its structure and the names of its modules;",
        "`pegbox.anatomy.of(model).describe()` shows the roles of any model. An architecture is one file of",
        "`pegbox/anatomy`.",
        "",
        "In a model of two towers `targets=vision` is the whole of one, and `exclude=text` keeps any other targets to",
        "it: `method.targets=attn.q,attn.v method.exclude=text`.",
        "",
        "| file | model types or classes | roles |",
        "| --- | --- | --- |",
    ]
    for source in sorted(files):
        held = {role for table in files[source].values() for role in (*table.roles, *part_roles(table))}
        roles = ", ".join(f"`{role}`" for role in ROLES if role in held)
        lines.append(f"| `{source}` | {', '.join(f'`{name}`' for name in files[source])} | {roles} |")
    notes = [f"- `{source}`: {note}" for source in sorted(files) if (note := first_lines(source))]
    lines += ["", *notes, "", "## Roles", "", "| role | what has it |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{role}` | {meaning} |" for role, meaning in ROLES.items())]) + "\n"


def part_roles(table: Any) -> list[str]:
    """Roles that are only some rows of a matrix."""
    return [role for split in table.splits.values() for role in split.parts]


def first_lines(source: str) -> str:
    """The remark at the top of a data file of `pegbox.anatomy`."""
    from importlib import resources

    lines = resources.files("pegbox.anatomy").joinpath(source).read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def settings_page() -> str:
    """Every setting of a run, and what other tools call it."""
    from pegbox.core.settings import schema
    from pegbox.train.settings import ALIASES, QUANTISE_WORDS, RunSettings

    theirs: dict[str, list[str]] = {f.name: [] for f in dataclasses.fields(RunSettings)}
    for alias, ours in ALIASES.items():
        theirs[ours].append(f"`{alias}`")
    theirs["quantise"] += [f"`{alias}`" for alias in QUANTISE_WORDS]
    lines = ["# Settings of a run", "", "For `pegbox train`, YAML recipes and `RunSettings`.", ""]
    lines += ["| setting | default | meaning | also accepted |", "| --- | --- | --- | --- |"]
    for name, spec in schema(RunSettings)["properties"].items():
        default = json.dumps(spec.get("default"))
        lines.append(f"| `{name}` | `{default}` | {spec.get('description', '')} | {', '.join(theirs[name])} |")
    return "\n".join([*lines, "", *objective_settings()]) + "\n"


def objective_settings() -> list[str]:
    """What every objective can be told, `objective.KEY`."""
    from pegbox import objectives
    from pegbox.core.settings import schema

    lines = ["# Settings of an objective", "", "Written as `objective.KEY`; see [objectives](../guides/objectives.md)."]
    for name in objectives.NAMES:
        settings = objectives.get(name).settings
        if settings is not None:
            lines += ["", f"## {name}", "", settings_table(schema(settings))]
    return lines


def command_line_page() -> str:
    """Every verb's help, as `pegbox VERB --help` prints it."""
    from pegbox.cli.app import SETTINGS_VERBS, app

    os.environ["COLUMNS"] = "100"
    about = {info.name: info.callback.__doc__ or "" for info in app.registered_commands if info.callback}
    lines = [
        "# Command line",
        "",
        "`pegbox VERB recipe.yaml key=value ...`: a recipe may come first, later values win. Where a verb is about one",
        "folder or model, that may stand first without its name: `pegbox merge out/ output=merged/`.",
    ]
    for module in SETTINGS_VERBS:
        verb = module.VERB
        help_text = verb.help(inspect.cleandoc(about[verb.name]))
        lines += ["", f"## {verb.name}", "", "```text", help_text, "```"]
    for name in ("demo", "methods", "check", "doctor"):
        lines += ["", f"## {name}", "", inspect.cleandoc(about[name])]
    return "\n".join([*lines, "", "## data check", "", "See [data](../guides/data.md)."]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
