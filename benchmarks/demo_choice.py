"""What the demo's recipe is chosen on: candidates judged on training rows that the demo does not use.

    python -m benchmarks.demo_choice        # about 15 minutes

Each candidate is the demo's comparison with another number of examples an intent, judged on the same 2,000 rows of
banking77's training part, drawn by seed from those that no candidate trains on.  The test part is not read.
Writes docs/results/demo_choice.json.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pegbox.evaluate.compare import compare
from pegbox.recipes import demo, shipped

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = Path("runs/demo_choice"), ROOT / "docs" / "results" / "demo_choice.json"
EXAMPLES, JUDGES = (5, 10, 20), 2000


def main() -> int:
    judges = _judges(RUNS)
    found = {str(count): _candidate(count, judges) for count in EXAMPLES}
    record = {"command": "python -m benchmarks.demo_choice", "rows": JUDGES, "examples an intent": found}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    for count, methods in found.items():
        print(count, {name: entry["over_probe"] for name, entry in methods.items()})
    return 0


def _judges(folder: Path) -> Path:
    """Training rows that none of the candidates trains on."""
    folder.mkdir(parents=True, exist_ok=True)
    used = set()
    for count in EXAMPLES:
        few = folder / f"{count}.jsonl"
        demo.write_few(shipped.data(demo.DATA) / "train.jsonl.gz", few, count)
        used |= set(few.read_text().splitlines())
    with gzip.open(shipped.data(demo.DATA) / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        unused = [line for line in file if line.rstrip("\n") not in used]
    judges = folder / "judges.jsonl"
    judges.write_text("".join(random.Random(0).sample(unused, JUDGES)))
    return judges


def _candidate(count: int, judges: Path) -> dict[str, Any]:
    output = RUNS / str(count)
    output.mkdir(exist_ok=True)
    recipe = replace(demo.settings(output), data=str(RUNS / f"{count}.jsonl"), test=str(judges))
    done = compare(recipe)
    rows = [asdict(entry) for entry in done.entries]
    return {row["name"]: {key: row[key] for key in ("quality", "over_probe", "rate", "edge", "tried")} for row in rows}


if __name__ == "__main__":
    sys.exit(main())
