"""Methods for many tasks: learning a new one from few examples, choosing between adapters, and several at once.

    python -m benchmarks.many_tasks            # `make many-tasks`, an hour or two; goes on where it stopped
    python -m benchmarks.many_tasks choice     # one of new, choice, dense

`new` tunes nano-llama on many small tasks together, then on 32 examples of a task that was not among them: MHR, Poly,
one LoRA for all tasks, and a LoRA that starts from nothing.  `choice` trains an adapter for each of some tasks, then
MeteoRA's gates over all of them, and asks which adapter a token of a held-out row is given to.  `dense` is
benchmarks/dense_tasks.py.  Makes docs/many-tasks.md.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.dense_tasks import dense_tasks
from benchmarks.effects import below, record
from benchmarks.kept import Kept, spelled
from zoo import instruct_data

ROOT = Path(__file__).parents[1]
DATA, RUN = ROOT.parent / "shared" / "data", ROOT / "runs" / "many_tasks"
SEEDS, RATES = (1, 2, 3), (1e-3, 3e-3, 1e-2)
SEEN, FEW, JUDGED, CHOSEN = 150, 32, 150, 100  # rows of a task: learned together, learned later, judged, for the rate
NEW = ("banking77", "sectors", "last word")
TOGETHER = {"learning_rate": 3e-3, "max_steps": 200, "batch_size": 16}
LATER = {"max_steps": 30, "batch_size": 16}
ALIKE: dict[str, Any] = {"rank": 4, "alpha": 4.0, "skills": 4}
MANY: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 16, "alpha": 16.0}),
    "poly": ("poly", ALIKE),
    "mhr": ("mhr", ALIKE | {"heads": 8}),
}
# what is tuned on the new task: from which of MANY, and with what changed
FROM: dict[str, tuple[str | None, dict[str, Any]]] = {
    "LoRA, from nothing": (None, {}),
    "LoRA, of all tasks": ("lora", {}),
    "Poly": ("poly", {}),
    "MHR": ("mhr", {}),
    "Poly, the routing alone": ("poly", {"train": "routing"}),
    "MHR-z, the routing alone": ("mhr", {"train": "routing"}),
    "Poly, the skills' mean": ("poly", {"train": "average"}),
    "MHR-mu, the skills' mean": ("mhr", {"train": "average"}),
}
BESIDE = {
    "MHR": "Poly",
    "MHR-z, the routing alone": "Poly, the routing alone",
    "MHR-mu, the skills' mean": "Poly, the skills' mean",
}
EXPERTS = ("banking77", "feelings", "slots", "capitals", "plus", "word problems")
EXPERT = {"rank": 8, "alpha": 16.0}
ALONE = {"learning_rate": 3e-3, "max_steps": 50, "batch_size": 16}
GATES = {"learning_rate": 3e-3, "max_steps": 240, "batch_size": 16}
ON = f"On nano-llama, {len(SEEDS)} seeds; the loss of answers in nats a token."
KEPT = Kept(RUN / "results.json")
PAGE = "many-tasks.md"
Row = dict[str, Any]


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"there is no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    RUN.mkdir(parents=True, exist_ok=True)
    for name in names or PARTS:
        title, method, make = PARTS[name]
        about, table = make()
        record(f"many_tasks_{name}", f"python -m benchmarks.many_tasks {name}", PAGE, about, {method: table})
        below(PAGE, [title for title, *_ in PARTS.values()], {title: f"{about}\n\n{table}"})


# -- new tasks -----------------------------------------------------------------------------------------------------


def new_tasks() -> tuple[str, str]:
    """What was done, in words, and a table: how well each way learns each new task."""
    tasks = all_tasks()
    seen = [name for name in tasks if name not in NEW]
    together = written("together", [row for name in seen for row in tasks[name][:SEEN]])
    found: dict[str, dict[str, list[float]]] = {way: {task: [] for task in NEW} for way in FROM}
    best: dict[str, float] = {}
    for seed in SEEDS:
        starts = {name: _together(name, together, len(seen), seed) for name in MANY}
        for way in FROM:
            if way not in best:
                tried = {r: sum(_later(way, t, tasks[t], starts, r, seed, "chosen") for t in NEW) for r in RATES}
                best[way] = min(tried, key=tried.__getitem__)
            for task in NEW:
                found[way][task].append(_later(way, task, tasks[task], starts, best[way], seed, "judged"))
    about = (
        f"{ON} {len(seen)} tasks together, {TOGETHER['max_steps']} steps; then {LATER['max_steps']} steps on each of "
        f"{len(NEW)} others, of three learning rates the best by the first seed on rows apart. Equal numbers in "
        "the adapters (four skills of rank 4, or one LoRA of rank 16)."
    )
    lines = [
        f"| | rate | {' | '.join(NEW)} | mean |",
        "| --- | ---: |" + " ---: |" * (len(NEW) + 1),
    ]
    means = {way: list(map(statistics.mean, zip(*by_task.values(), strict=True))) for way, by_task in found.items()}
    for way, by_task in found.items():
        cells = map(spelled, (*by_task.values(), means[way]))
        lines.append(f"| {way} | {best[way]:g} | {' | '.join(cells)} |")
    lines += ["", "Means beside one another, seed by seed:", ""]
    for way, other in BESIDE.items():
        change = spelled([a - b for a, b in zip(means[way], means[other], strict=True)])
        lines.append(f"- {way}, less {other}: {change}")
    return about, "\n".join(lines)


def _together(name: str, data: Path, tasks: int, seed: int) -> Path:
    """The folder of an adapter that has seen all tasks."""
    method, settings = MANY[name]
    more = {"tasks": tasks} if name != "lora" else {}
    folder = RUN / f"{name}-{seed}"
    KEPT.once(f"together {name} {seed}", trained, folder, data, None, method, settings | more, seed, TOGETHER)
    return folder


def _later(
    way: str, task: str, rows: Sequence[Row], starts: Mapping[str, Path], rate: float, seed: int, on: str
) -> float:
    """The loss after a task's few examples: on the rows that are `judged`, or on those by which rates are `chosen`."""
    of, changes = FROM[way]
    method, settings = MANY[of or "lora"]
    few = written(f"few {task} {seed}", random.Random(seed).sample(rows[JUDGED + CHOSEN :], FEW))
    held = written(f"{on} {task}", rows[:JUDGED] if on == "judged" else rows[JUDGED : JUDGED + CHOSEN])
    more = LATER | {"learning_rate": rate} | ({"start_from": str(starts[of])} if of else {})
    name = f"later {way} {task} {rate:g} {seed} {on}"
    return KEPT.once(name, trained, RUN / "later", few, held, method, settings | changes, seed, more)


# -- choosing ------------------------------------------------------------------------------------------------------


def choosing() -> tuple[str, str]:
    """What was done, in words, and a table: MeteoRA beside a task's own adapter, and how often its gates choose it."""
    tasks = all_tasks()
    parts = {name: (tasks[name][JUDGED:], written(f"held {name}", tasks[name][:JUDGED])) for name in EXPERTS}
    found: dict[str, list[list[float]]] = {name: [] for name in EXPERTS}
    for seed in SEEDS:
        for name, losses in _chosen(parts, seed).items():
            found[name].append(losses)
    about = (
        f"{ON} An adapter for each of {len(EXPERTS)} tasks, {ALONE['max_steps']} steps; then MeteoRA's gates on rows "
        f"of all of them, {GATES['max_steps']} steps, the adapters as they are. Chosen: of the tokens of held-out rows "
        "and of the layers, the share whose first choice is the task's own adapter (by chance "
        f"{1 / len(EXPERTS):.0%}); in rows: the share of rows in which that one is chosen most often."
    )
    lines = [
        "| task | base | another's adapter | MeteoRA | its own adapter | chosen | in rows |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, of_seeds in found.items():
        base, other, own, gated, *shares = zip(*of_seeds, strict=True)
        cells = [*map(spelled, (base, other, gated, own)), *(f"{statistics.mean(share):.0%}" for share in shares)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return about, "\n".join(lines)


def _chosen(parts: Mapping[str, tuple[Sequence[Row], Path]], seed: int) -> dict[str, list[float]]:
    """By task: the losses of the base, another's adapter, its own, the gates; and the shares of right choices."""
    folders = {name: RUN / f"expert-{name.replace(' ', '-')}-{seed}" for name in EXPERTS}
    for name, (rows, _) in parts.items():
        data = written(f"expert {name}", rows)
        KEPT.once(f"expert {name} {seed}", trained, folders[name], data, None, "lora", EXPERT, seed, ALONE)
    data, gates = written("gates", [row for rows, _ in parts.values() for row in rows[:SEEN]]), RUN / f"gates-{seed}"
    given = {"adapters": [str(folder) for folder in folders.values()], "names": list(EXPERTS)}
    KEPT.once(f"gates {seed}", trained, gates, data, None, "meteora", given, seed, GATES)
    found = {}
    for place, (name, (_, held)) in enumerate(parts.items()):
        other = folders[EXPERTS[(place + 1) % len(EXPERTS)]]
        found[name] = [
            KEPT.once(f"loss base {name} {seed}", judged, folders[name], held, True),
            KEPT.once(f"loss other {name} {seed}", judged, other, held, False),
            KEPT.once(f"loss own {name} {seed}", judged, folders[name], held, False),
            KEPT.once(f"loss gates {name} {seed}", judged, gates, held, False),
            KEPT.once(f"right {name} {seed}", right, gates, held, place, False),
            KEPT.once(f"right rows {name} {seed}", right, gates, held, place, True),
        ]
    return found


def right(folder: Path, held: Path, place: int, of_rows: bool) -> float:
    """The share of tokens and layers whose gate likes an expert best, or of rows in which it is liked most often."""
    from pegbox.evaluate.opened import open_adapter

    opened = open_adapter(str(folder))
    assert opened.tokenizer is not None
    hits: list[float] = []
    for line in held.read_text().splitlines()[:50]:
        turns = json.loads(line)["messages"]
        inputs = opened.tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        opened.tuned(**inputs)
        liked = torch.cat([route.logits.argmax(-1).flatten() for route in opened.tuned.context.routes.values()])
        hits.append(float(liked.mode().values == place) if of_rows else liked.eq(place).float().mean().item())
    return statistics.mean(hits)


def judged(folder: Path, held: Path, before: bool) -> float:
    """The loss of an adapter, or of its base, on held-out rows."""
    from pegbox.evaluate.evaluate import EvalSettings, evaluate

    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(EvalSettings(adapter=str(folder), data=str(held), objective="sft"))
    return (found.before if before else found.after)["nll"].mean


# -- what both do --------------------------------------------------------------------------------------------------


def trained(
    folder: Path, data: Path, held: Path | None, method: str, own: Mapping[str, Any], seed: int, more: Mapping[str, Any]
) -> float:
    """Train into a folder; the loss on held-out rows after the last step, 0 without."""
    from pegbox.train.run import train
    from pegbox.train.settings import run_settings

    shutil.rmtree(folder, ignore_errors=True)
    values = {"model": "nano-llama", "data": str(data), "method": method, "method_settings": own, "seed": seed}
    values |= {"objective": "sft", "max_length": 256, "dtype": "bfloat16", "output": str(folder), **more}
    if held is not None:  # looked at once, so that they choose no checkpoint
        values |= {"valid": str(held), "eval_steps": more["max_steps"], "save_steps": more["max_steps"]}
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(run_settings(values))
    return float(result.metrics.get("loss", 0.0))


def written(name: str, rows: Iterable[Row]) -> Path:
    """A file of rows."""
    path = RUN / f"{name.replace(' ', '-')}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def all_tasks() -> dict[str, list[Row]]:
    """Conversations by task, in a drawn order: intents by domain, feelings, slots, words, sums, sectors."""
    with gzip.open(DATA / "clinc150/train.jsonl.gz", "rt", encoding="utf-8") as file:
        domains = {row["label"].replace("_", " "): row["domain"] for row in map(json.loads, file)}

    def of_clinc(asked: str, answer: str) -> str:
        return domains.get(answer, "")

    def of_snips(asked: str, answer: str) -> str:
        return "slots" if asked.startswith("What is the ") else "intents"

    def of_words(asked: str, answer: str) -> str:
        openings = {
            "How many": "count",
            "Say this": "repeat",
            "Write this": "capitals",
            "What is the first": "first word",
        }
        return next((name for words, name in openings.items() if asked.startswith(words)), "last word")

    def of_sums(asked: str, answer: str) -> str:
        return "plus" if "+" in asked else "minus"

    makers: dict[Any, Callable[[str, str], str]] = {
        instruct_data.clinc150: of_clinc,
        instruct_data.snips: of_snips,
        instruct_data.words: of_words,
        instruct_data.sums: of_sums,
        instruct_data.goemotions: lambda asked, answer: "feelings",
        instruct_data.banking77: lambda asked, answer: "banking77",
        instruct_data.sectors: lambda asked, answer: "sectors",
        instruct_data.gsm8k: lambda asked, answer: "word problems",
    }
    found: dict[str, list[Row]] = {}
    for make, name_of in makers.items():
        for turns in make(DATA, random.Random(0)):
            if name := name_of(turns[0]["content"], turns[1]["content"]):
                found.setdefault(name, []).append({"messages": turns, "task": name})
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return found


# a part's title, the method that it is about, and what makes it
PARTS: dict[str, tuple[str, str, Callable[[], tuple[str, str]]]] = {
    "new": (f"A new task from {FEW} examples", "mhr", new_tasks),
    "choice": ("Choosing between adapters", "meteora", choosing),
    "dense": ("Dense tasks of one picture", "mtlora", dense_tasks),
}

if __name__ == "__main__":
    main(sys.argv[1:])
