"""The weight-space family beside LoRA, DoRA, PiSSA, rsLoRA and full tuning, on two models and three data sets.

    python -m benchmarks.weight_space            # `make weight-space`, some hours; goes on where it stopped
    python -m benchmarks.weight_space banking77  # one of them

Every method gets as many learning rates around its usual one, then three seeds with the best; sizes near one another.
Writes the tables of docs/weight-space.md, and what methods' own pages quote of them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.effects import below, record, rows_of
from zoo import instruct_data

ROOT = Path(__file__).parents[1]
DATA, RUN = ROOT.parent / "shared" / "data", ROOT / "runs" / "weight_space"
BUDGET: dict[str, Any] = {"trials": 3, "seeds": 3}
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
    "monarch": ("monarch", {}),
    "increlora": ("increlora", RANK | {"first": 2, "wait": 10, "every": 5, "top": 12}),
    "triadaptlora": ("triadaptlora", RANK | {"first": 2, "wait": 10, "every": 5}),
    "diffora": ("diffora", RANK | {"search_steps": 20}),
    "gradnormlorp": ("gradnormlorp", RANK | {"gap": 50}),
    "mola": ("mola", {"rank": 2, "alpha": 4.0, "experts": 4}),
    "mhr": ("mhr", {"rank": 2, "skills": 4, "heads": 4}),
    "mtlora": ("mtlora", {"rank": 8, "scale": 2.0}),
}
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_louder": ("lora", RANK | {"alpha": 64.0}),
    "increlora_fixed": ("increlora", METHODS["increlora"][1] | {"fixed_scale": True}),
    "triadaptlora_fixed": ("triadaptlora", METHODS["triadaptlora"][1] | {"fixed_scale": True}),
}
FULL: dict[str, tuple[str, dict[str, Any]]] = {"full": ("full", {})}
KNOWN = METHODS | CONTROLS | FULL
RATE = 3.16e-3  # the middle of the grid: 1e-3, 3.2e-3, 1e-2
RATES = dict.fromkeys(METHODS | CONTROLS, RATE) | {
    "lora_ga": 3.16e-4,  # starts near where the gradient leads
    "inttune": 9.5e-3,  # few numbers, each the size of a whole term
    "full": 1.58e-4,
}


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        about: model, data and steps, in words.
        settings: of the comparison; `data` and `test` are paths within the data sets.
        labels: of KNOWN.
        rates: middles of grids, by label.
        full: whether full tuning is beside them, in a comparison of its own: in float32, as its weights are the base's.
    """

    about: str
    settings: dict[str, Any]
    labels: tuple[str, ...] = tuple(METHODS)
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    full: bool = True


SENTENCES: dict[str, Any] = {"model": "minilm", "max_steps": 100, "batch_size": 32, "max_length": 64}
BANKING = SENTENCES | {"data": "banking77/train.jsonl.gz", "test": "banking77/test.jsonl.gz", "valid_share": 0.06}
HEAD = ("lora", "lora_ga", "increlora", "triadaptlora")
STUDIES = {
    "banking77": Study(
        "all-MiniLM-L6-v2 on banking77, a new classifier beside the adapter, 100 steps of 32 sentences.", BANKING
    ),
    "banking77_head": Study(
        "all-MiniLM-L6-v2 on banking77, 100 steps of 32 sentences, with ten times the adapter's learning rate for the "
        "new classifier: an adapter that starts near where the gradient leads wants small steps, as one of full rank "
        "from the first step on may, a classifier that starts from nothing does not.",
        BANKING | {"head_rate": 10.0},
        HEAD,
        {"lora": 1e-3, "lora_ga": 1e-3, "increlora": RATE, "triadaptlora": RATE},
        full=False,
    ),
    "banking77_growth": Study(
        "all-MiniLM-L6-v2 on banking77, a new classifier beside the adapter, 100 steps of 32 sentences, growth alone. "
        "While ranks are few, alpha / rank is large: LoRA with four times the alpha has the scale that growth starts "
        "with, and with fixed_scale growth has LoRA's throughout.",
        BANKING,
        tuple(CONTROLS),
        full=False,
    ),
    "sst2": Study(
        "all-MiniLM-L6-v2 on SST-2, a new classifier with ten times the adapter's learning rate, 50 steps of 32 "
        "sentences.",
        SENTENCES
        | {"data": "sst2/train.jsonl.gz", "test": "sst2/dev.jsonl", "valid_share": 0.08}
        | {"max_steps": 50, "head_rate": 10.0},
    ),
    "gsm8k": Study(
        "nano-llama on GSM8K's shorter solutions, 60 steps of 8 x 256 tokens, the loss of the answers.",
        {"model": "nano-llama", "objective": "sft", "test_share": 0.1, "max_length": 256, "packing": True}
        | {"max_steps": 60, "batch_size": 8},
    ),
}


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in STUDIES]:
        raise SystemExit(f"there is no study {unknown[0]!r}; expected some of {', '.join(STUDIES)}")
    RUN.mkdir(parents=True, exist_ok=True)
    for name in names or STUDIES:
        print(f"# {name}", flush=True)
        study, command = STUDIES[name], f"python -m benchmarks.weight_space {name}"
        some = {label: KNOWN[label] for label in study.labels}
        tables = [compared(study, name, some, dtype="bfloat16")]
        if study.full:
            tables.append(compared(study, f"{name}_full", FULL, dtype="float32"))
        tried = by_rate(RUN / name / "trials.jsonl", study.settings["max_steps"])
        record(f"weight_space_{name}", command, PAGE, study.about, by_method(tables))
        below(PAGE, STUDIES, {name: "\n".join([f"{study.about}\n", *tables, tried])})


def compared(study: Study, folder: str, methods: Mapping[str, tuple[str, dict[str, Any]]], **more: Any) -> str:
    """The table of some methods."""
    from pegbox.evaluate.compare import compare
    from pegbox.evaluate.compare_settings import compare_settings

    places = {key: str(DATA / study.settings[key]) for key in ("data", "test") if key in study.settings}
    own = {label: settings for label, (_, settings) in methods.items() if settings}
    values: dict[str, Any] = BUDGET | {"data": str(_questions())} | study.settings | places | more
    values |= {"rates": {label: study.rates[label] for label in methods}}
    values |= {"methods": tuple(f"{label}={of}" for label, (of, _) in methods.items()), "own": own}
    return compare(compare_settings(values | {"output": str(RUN / folder)})).markdown()


def by_method(tables: Sequence[str]) -> dict[str, str]:
    """Rows of some tables under their heads, by the method that labels stand for."""
    from pegbox import methods

    found: dict[str, str] = {}
    for label, table in [row for whole in tables for row in rows_of(whole).items()]:
        if label in KNOWN:
            name = methods.get(KNOWN[label][0]).name()
            found[name] = f"{found[name]}\n{table.splitlines()[-1]}" if name in found else table
    return found


def by_rate(log: Path, steps: int) -> str:
    """What each learning rate came to, method by method: who is quick where."""
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


def _questions() -> Path:
    """A file of gsm8k's short solutions as conversations."""
    path = RUN / "gsm8k.jsonl"
    rows = [{"messages": turns} for turns in instruct_data.gsm8k(DATA, random.Random(0))][:3000]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
