"""The measured effect of methods on one real model and one real data set.

    python -m benchmarks.effects            # every method that a sentence encoder takes: `make effects`, 15 minutes
    python -m benchmarks.effects --of-demo  # quote what `make demo` has just written, in the README too

Writes docs/comparison.md and docs/results/effects/comparison.json, from which the methods' pages quote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
RUN, DEMO = Path("runs/effects"), Path("runs/demo")
SETTING = (
    "all-MiniLM-L6-v2 on banking77 (77 intents, 20 training examples of each, the test questions), the classifier "
    "started from the linear probe; the same learning-rate trials for every method, then three seeds.  The number of "
    "examples was compared on training rows that no method sees (docs/results/demo_choice.json); while the demo was "
    "first designed, the middles of the rates' grids were looked at on test rows."
)
BEGIN, END = "<!-- demo table -->", "<!-- end of the demo table -->"
MEASURED = "<!-- what was measured: written by the command, do not edit below -->"
# Sizes near one another where the method has a size; the others as they come.
OWN = {
    "lora.rank": 8,
    "dora.rank": 8,
    "miss.rank": 16,
    "bat.rank": 16,
    "series.bottleneck": 32,
    "parallel.bottleneck": 16,
    "prompt_tuning.tokens": 10,
}
APART = ("scedit", "meteora")  # one edits the skips of a U-Net, the other wants adapters


def main() -> int:
    if "--of-demo" in sys.argv:
        table = (DEMO / "table.md").read_text()
        quote(table, "make demo")
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}")
        return 0
    quote(compared(), "make effects")
    return 0


def compared() -> str:
    """Every method at the demo's budget; the table."""
    from pegbox import methods
    from pegbox.evaluate.compare import compare
    from pegbox.evaluate.compare_settings import compare_settings
    from pegbox.recipes import demo

    demo.check_model()
    RUN.mkdir(parents=True, exist_ok=True)
    base = demo.settings(RUN)
    shared = ("model", "data", "test", "batch_size", "schedule", "warmup", "valid_share", "max_length", "warm_start")
    values = {name: getattr(base, name) for name in shared} | {"rates": dict(base.rates)}
    values |= {"output": str(RUN), "dtype": "float32", "optimizer": base.optimizer, **OWN}
    values["methods"] = [name for name in methods.names() if name not in APART]
    values |= {name: getattr(base, name) for name in ("trials", "seeds", "trial_steps", "max_steps")}
    return compare(compare_settings(values)).markdown()


def quote(table: str, command: str) -> None:
    """Write the page of all methods, and the line of each for its own page."""
    title = f"# Comparison\n\n{SETTING} Made by `{command}`.\n\n"
    (DOCS / "comparison.md").write_text(title + table)
    record("comparison", command, "comparison.md", SETTING, rows_of(table))


def record(name: str, command: str, page: str, setting: str, tables: Mapping[str, str]) -> None:
    """Leave what methods' own pages quote: a table for each."""
    folder = DOCS / "results" / "effects"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"command": command, "page": page, "setting": setting, "methods": dict(tables)}
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def below(page: str, order: Iterable[str], made: Mapping[str, str]) -> None:
    """Write sections, by title, below the mark of a page: what stands before it and sections not made anew are kept."""
    path = DOCS / page
    head, _, measured = path.read_text().partition(MEASURED)
    kept = dict(section.split("\n", 1) for section in measured.split("\n## ")[1:])
    sections = kept | made
    parts = [f"## {title}\n\n{sections[title].strip()}" for title in order if title in sections]
    path.write_text("\n\n".join([head.rstrip(), MEASURED, *parts]) + "\n")


def rows_of(table: str) -> dict[str, str]:
    """The rows of a Markdown table by what their first cell names, each under the table's head."""
    header, rule, *rows = [line for line in table.splitlines() if line.startswith("|")]
    return {row.split("|")[1].strip(" *"): f"{header}\n{rule}\n{row}" for row in rows}


if __name__ == "__main__":
    sys.exit(main())
