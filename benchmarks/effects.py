"""The measured effect of every method, on one real model and one real data set: `make effects`.

Writes docs/comparison.md and docs/results/effects.json, from which the methods' pages quote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
RUN = Path("runs/effects")
COMMAND = "make effects"
SETTING = (
    "all-MiniLM-L6-v2 on banking77 (77 intents, 20 training examples of each, the official test questions), the "
    "classifier started from the linear probe; the same learning-rate trials for every method, then three seeds."
)
# Sizes near one another where the method has a size; the others as they come.
OWN = {
    "lora.rank": 8,
    "dora.rank": 8,
    "miss.rank": 16,
    "bat.rank": 16,
    "series.bottleneck": 32,
    "prompt_tuning.tokens": 10,
}


def main() -> int:
    from pegbox import methods
    from pegbox.evaluate.compare import compare
    from pegbox.evaluate.compare_settings import compare_settings
    from pegbox.recipes import demo

    demo.check_model()
    RUN.mkdir(parents=True, exist_ok=True)
    base = demo.settings(RUN)
    values = {
        "model": base.model,
        "data": base.data,
        "test": base.test,
        "output": str(RUN),
        "methods": methods.names(),
        "trials": 4,
        "seeds": 3,
        "trial_steps": 24,
        "max_steps": 48,
        "batch_size": 32,
        "schedule": "linear",
        "warmup": 0.1,
        "valid_share": 0.2,
        "max_length": 64,
        "warm_start": True,
        "dtype": "float32",
        **OWN,
    }
    result = compare(compare_settings(values))
    (DOCS / "results").mkdir(exist_ok=True)
    header = result.header
    rows = {
        e.name: f"| {' | '.join(header)} |\n| {' | '.join(['---'] * len(header))} |\n| {' | '.join(result.cells(e))} |"
        for e in result.entries
    }
    record = {"command": COMMAND, "setting": SETTING, "methods": rows}
    (DOCS / "results" / "effects.json").write_text(json.dumps(record, indent=2) + "\n")
    table = (RUN / "table.md").read_text()
    title = f"# Comparison\n\n{SETTING} Made by `{COMMAND}`.\n\n"
    (DOCS / "comparison.md").write_text(title + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
