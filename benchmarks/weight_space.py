"""The weight-space family beside LoRA, DoRA, PiSSA, rsLoRA and full tuning, on two models and three data sets.

    python -m benchmarks.weight_space            # `make weight-space`, some hours; goes on where it stopped
    python -m benchmarks.weight_space banking77  # one of them

Every method gets as many learning rates around its usual one, then three seeds with the best; sizes near one another.
Writes docs/weight-space.md, and what methods' own pages quote of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.effects import record, rows_of

ROOT = Path(__file__).parents[1]
DATA, DOCS, RUN = ROOT.parent / "shared" / "data", ROOT / "docs", ROOT / "runs" / "weight_space"
BUDGET: dict[str, Any] = {"trials": 4, "seeds": 3}
SENTENCES: dict[str, Any] = {"model": "minilm", "trial_steps": 50, "max_steps": 100, "batch_size": 32, "max_length": 64}
ABOUT = {
    "banking77": "all-MiniLM-L6-v2 on banking77, a new classifier beside the adapter, 100 steps of 32 sentences",
    "sst2": "all-MiniLM-L6-v2 on SST-2, a new classifier beside the adapter, 100 steps of 32 sentences",
    "gsm8k": "nano-llama on GSM8K's shorter solutions, 60 steps of 8 x 256 tokens, the loss of the answers",
}
STUDIES: dict[str, dict[str, Any]] = {
    "banking77": SENTENCES
    | {"data": "banking77/train.jsonl.gz", "test": "banking77/test.jsonl.gz", "valid_share": 0.06},
    "sst2": SENTENCES | {"data": "sst2/train.jsonl.gz", "test": "sst2/dev.jsonl", "valid_share": 0.1},
    "gsm8k": {"model": "nano-llama", "data": RUN / "gsm8k.jsonl", "objective": "sft", "test_share": 0.1}
    | {"trial_steps": 30, "max_steps": 60, "batch_size": 8, "max_length": 256, "packing": True},
}
PAGE = "weight-space.md"
RANK = {"rank": 8, "alpha": 16.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", RANK),
    "rslora": ("lora", RANK | {"rslora": True}),
    "pissa": ("lora", RANK | {"start": "pissa"}),
    "dora": ("dora", RANK),
    "eva": ("eva", RANK),
    "lora_ga": ("lora_ga", RANK),
    "nlora": ("nlora", RANK),
    "slora": ("slora", RANK),
    "inttune": ("inttune", {"rank": 64, "alpha": 64.0}),
    "loldu": ("loldu", {"rank": 64, "alpha": 64.0}),
    "more": ("more", {}),
    "increlora": ("increlora", RANK | {"first": 2, "wait": 10, "every": 5, "top": 12}),
    "triadaptlora": ("triadaptlora", RANK | {"first": 2, "wait": 10, "every": 5}),
    "diffora": ("diffora", RANK | {"search_steps": 20}),
    "gradnormlorp": ("gradnormlorp", RANK | {"gap": 50}),
    "mola": ("mola", {"rank": 2, "alpha": 4.0, "experts": 4}),
    "mhr": ("mhr", {"rank": 2, "skills": 4, "heads": 4}),
    "mtlora": ("mtlora", {"rank": 8, "scale": 2.0}),
}
RATE = 1.78e-3  # the middle of the grid: 3.2e-4 .. 1e-2
RATES = dict.fromkeys(METHODS, RATE) | {
    "lora_ga": 5.62e-4,  # starts near where the gradient leads
    "inttune": 5.34e-3,  # few numbers, each the size of a whole term
    "loldu": 5.62e-3,
}
FULL: dict[str, tuple[str, dict[str, Any]]] = {"full": ("full", {})}  # apart, in float32: its weights are the base's


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in STUDIES]:
        raise SystemExit(f"there is no study {unknown[0]!r}; expected some of {', '.join(STUDIES)}")
    for name in names or STUDIES:
        print(f"# {name}", flush=True)
        adapters = compared(name, name, METHODS, dtype="bfloat16", rates=RATES)
        full = compared(name, f"{name}_full", FULL, dtype="float32")
        tried = by_rate(RUN / name / "trials.jsonl", STUDIES[name]["trial_steps"])
        (RUN / f"{name}.md").write_text(f"{adapters}\n{full}\n{tried}")
        record(f"weight_space_{name}", "make weight-space", PAGE, f"{ABOUT[name]}.", by_method(adapters, full))
        write_page()


def compared(name: str, folder: str, methods: dict[str, tuple[str, dict[str, Any]]], **more: Any) -> str:
    """The table of one study."""
    from pegbox.evaluate.compare import compare
    from pegbox.evaluate.compare_settings import compare_settings

    RUN.mkdir(parents=True, exist_ok=True)
    study = STUDIES[name] | {"methods": tuple(f"{label}={of}" for label, (of, _) in methods.items())}
    for key in ("data", "test"):
        if isinstance(study.get(key), str):
            study[key] = str(DATA / study[key])
    if name == "gsm8k":
        _write_questions(Path(study["data"]))
        study["data"] = str(study["data"])
    own = {label: settings for label, (_, settings) in methods.items() if settings}
    return compare(compare_settings(BUDGET | study | {"own": own, "output": str(RUN / folder)} | more)).markdown()


def by_method(adapters: str, full: str) -> dict[str, str]:
    """Rows of both tables under their heads, by the method that labels stand for."""
    from pegbox import methods

    found: dict[str, str] = {}
    known = METHODS | FULL
    for label, table in (rows_of(adapters) | rows_of(full)).items():
        if label in known:
            name = methods.get(known[label][0]).name()
            found[name] = f"{found[name]}\n{table.splitlines()[-1]}" if name in found else table
    return found


def by_rate(log: Path, steps: int) -> str:
    """What each learning rate had come to when it was chosen from, method by method: who is quick where."""
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    tried = {(r["run"]["method"], r["run"]["rate"]): r["valid"] for r in runs if r["run"]["stage"] == "trial"}
    rates = sorted({rate for _, rate in tried})
    lines = [
        f"On the validation rows after {steps} steps, by learning rate:",
        "",
        f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "| --- |" + " ---: |" * len(rates),
    ]
    for method in dict.fromkeys(name for name, _ in tried):
        cells = (f"{tried[method, rate]:.3f}" if (method, rate) in tried else "" for rate in rates)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write_questions(path: Path) -> None:
    """gsm8k's short solutions as conversations."""
    import random

    from zoo.instruct_data import gsm8k

    rows = [{"messages": turns} for turns in gsm8k(DATA, random.Random(0))][:3000]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_page() -> None:
    """docs/weight-space.md, of the studies that are there."""
    parts = [
        "# The weight-space family",
        "",
        "Starts, growing ranks, structured matrices and experts beside LoRA, DoRA, PiSSA, rsLoRA and full tuning:",
        f"{BUDGET['trials']} learning rates each, three seeds with the best, the same steps; adapters in float32 on a",
        "base in bfloat16, full tuning in float32. Made by `make weight-space`.",
    ]
    for name in STUDIES:
        if (RUN / f"{name}.md").exists():
            parts += ["", f"## {name}", "", f"{ABOUT[name]}.", "", (RUN / f"{name}.md").read_text().strip()]
    (DOCS / PAGE).write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
