"""The weight-space family beside LoRA, DoRA, PiSSA, rsLoRA and full tuning, on two models and three data sets.

    python -m benchmarks.weight_space            # `make weight-space`, some hours; goes on where it stopped
    python -m benchmarks.weight_space banking77  # one of them

Every method gets as many learning rates around its usual one, then three seeds with the best; sizes near one another.
Writes docs/weight-space.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, DOCS, RUN = ROOT.parent / "shared" / "data", ROOT / "docs", ROOT / "runs" / "weight_space"
BUDGET: dict[str, Any] = {"trials": 3, "seeds": 3, "dtype": "float32"}
STUDIES: dict[str, dict[str, Any]] = {
    "banking77": {"model": "minilm", "data": "banking77/train.jsonl.gz", "test": "banking77/test.jsonl.gz"}
    | {"limit": 3000, "max_steps": 150, "batch_size": 32, "max_length": 64},
    "sst2": {"model": "minilm", "data": "sst2/train.jsonl.gz", "test": "sst2/dev.jsonl"}
    | {"limit": 3000, "max_steps": 150, "batch_size": 32, "max_length": 64},
    "gsm8k": {"model": "nano-llama", "data": RUN / "gsm8k.jsonl", "objective": "sft"}
    | {"max_steps": 100, "batch_size": 8, "max_length": 256, "packing": True, "test_share": 0.1},
}
RANK = {"rank": 8, "alpha": 16.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", RANK),
    "rslora": ("lora", RANK | {"rslora": True}),
    "pissa": ("lora", RANK | {"start": "pissa"}),
    "dora": ("dora", RANK),
    "full": ("full", {}),
    "eva": ("eva", RANK),
    "lora_ga": ("lora_ga", RANK),
    "nlora": ("nlora", RANK),
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


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in STUDIES]:
        raise SystemExit(f"there is no study {unknown[0]!r}; expected some of {', '.join(STUDIES)}")
    for name in names or STUDIES:
        print(f"# {name}", flush=True)
        (RUN / f"{name}.md").write_text(compared(name))
    write_page()


def compared(name: str) -> str:
    """The table of one study."""
    from pegbox.evaluate.compare import compare
    from pegbox.evaluate.compare_settings import compare_settings

    RUN.mkdir(parents=True, exist_ok=True)
    study = STUDIES[name] | {"methods": tuple(f"{label}={of}" for label, (of, _) in METHODS.items())}
    for key in ("data", "test"):
        if isinstance(study.get(key), str):
            study[key] = str(DATA / study[key])
    if name == "gsm8k":
        _write_questions(Path(study["data"]))
        study["data"] = str(study["data"])
    own = {label: settings for label, (_, settings) in METHODS.items() if settings}
    return compare(compare_settings(BUDGET | study | {"own": own, "output": str(RUN / name)})).markdown()


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
        f"{BUDGET['trials']} learning rates each, three seeds with the best, the same steps. Made by",
        "`make weight-space`.",
    ]
    for name in STUDIES:
        if (RUN / f"{name}.md").exists():
            parts += ["", f"## {name}", "", (RUN / f"{name}.md").read_text().strip()]
    (DOCS / "weight-space.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
