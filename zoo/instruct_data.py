"""Instruction data for small models, from permissively licensed sets: `python zoo/instruct_data.py DATA OUTPUT`.

DATA holds the sets as folders; OUTPUT gets a JSON Lines file of conversations (`messages`) for each of them, the same
bytes every time.  Answers are short, as a model of some million parameters has no room for long ones.

    file            from                            licence     what is asked
    seeds           self_instruct/seed_tasks        Apache-2.0  what people thought of
    oasst           oasst/conversations             Apache-2.0  conversations with people
    glaive          llamafactory_demo/glaive        Apache-2.0  the turns before a tool is called
    gsm8k           gsm8k/train                     MIT         word problems, solved step by step
    clinc150        clinc150/train                  CC BY 3.0   which of four intents
    banking77       banking77/train                 CC BY 4.0   which of four intents
    snips           snips/train                     CC0         which of seven intents, and what was named
    goemotions      goemotions/train                Apache-2.0  which of four feelings
    sectors         sp500_sectors/companies         PDDL        which of four sectors
    words           snips/train                     CC0         counting, repeating, capital letters
    sums            made here                                   sums and differences

Left out: llamafactory_demo/alpaca_en_demo, whose texts go back to data under CC BY-NC.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LONGEST = 1600  # characters of a conversation
SOLVED = 200  # of a solution: in longer ones a small model loses the end
OPTIONS = 4
NONE = "none of these"

INTENT = (
    "Which intent is this: {text}\nChoose from: {options}.",
    "{text}\n\nWhat does the speaker want? Choose from: {options}.",
    "Here is a request: {text}\nIs its intent {options}?",
)
FEELING = (
    "Which feeling does this show: {text}\nChoose from: {options}.",
    "{text}\n\nHow does the writer feel: {options}?",
)
SECTOR = ("In which sector is the company {text}? Choose from: {options}.",)


def main(data: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, make in MAKERS.items():
        rows = [row for row in make(data, random.Random(name)) if row and _size(row) <= LONGEST]
        text = "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        total += len(rows)
        print(f"{name:12} {len(rows):6,} rows  {len(text.encode()):10,} bytes")
    print(f"{'all':12} {total:6,} rows")


# -- sets ----------------------------------------------------------------------------------------------------------


def seeds(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    for task in _rows(data / "self_instruct/seed_tasks.jsonl"):
        for instance in task["instances"]:
            asked = f"{task['instruction']}\n\n{instance['input']}" if instance["input"] else task["instruction"]
            yield _asked(asked, instance["output"])


def oasst(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    """As many turns from the beginning as fit."""
    for conversation in _rows(data / "oasst/conversations.jsonl.gz"):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in conversation["messages"]]
        yield _until(turns, lambda part: _size(part) <= LONGEST)


def glaive(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    roles = {"human": "user", "gpt": "assistant"}
    for row in _rows(data / "llamafactory_demo/glaive_toolcall_en_demo.jsonl.gz"):
        turns = [{"role": roles.get(turn["from"], "tool"), "content": turn["value"]} for turn in row["conversations"]]
        yield _until(turns, lambda part: all(turn["role"] != "tool" for turn in part))


def gsm8k(data: Path, draw: random.Random, split: str = "train") -> Iterator[list[Row]]:
    for row in _rows(data / f"gsm8k/{split}.jsonl.gz"):
        steps, _, result = re.sub(r"<<[^>]*>>", "", row["answer"]).partition("\n#### ")
        if len(steps) > SOLVED:
            continue
        yield _asked(row["question"], f"{steps}\nThe answer is {result.strip()}.")


def clinc150(data: Path, draw: random.Random, split: str = "train") -> Iterator[list[Row]]:
    rows = [(row["text"], row["label"]) for row in _rows(data / f"clinc150/{split}.jsonl.gz")]
    names = sorted({label for _, label in rows} - {"oos"})
    for text, label in draw.sample(rows, min(4500, len(rows))):
        yield _choice(draw, INTENT, text, NONE if label == "oos" else label, names)


def banking77(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    rows = [(row["text"], row["label"]) for row in _rows(data / "banking77/train.jsonl.gz")]
    names = sorted({label for _, label in rows})
    for text, label in draw.sample(rows, 4000):
        yield _choice(draw, INTENT, text, label, names)


def snips(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    rows = list(_rows(data / "snips/train.jsonl.gz"))
    names = sorted({_spaced(row["intent"]) for row in rows})
    for row in draw.sample(rows, 3000):
        text = row["text"].strip()
        yield _choice(draw, INTENT, text, _spaced(row["intent"]), names, among=len(names))
        if row["slots"]:
            slot = draw.choice(row["slots"])
            yield _asked(f"What is the {_plain(slot['slot'])} here: {text}", slot["value"].strip())


def goemotions(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    rows = [
        (row["text"], row["labels"][0]) for row in _rows(data / "goemotions/train.jsonl.gz") if len(row["labels"]) == 1
    ]
    names = sorted({label for _, label in rows} - {"neutral"})
    felt = [(text, label) for text, label in rows if label != "neutral"]
    calm = [(text, label) for text, label in rows if label == "neutral"]
    for text, label in draw.sample(felt, 3000) + draw.sample(calm, 500):
        yield _choice(draw, FEELING, text, label if label in names else NONE, names)


def sectors(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    rows = [(row["security"], row["sector"]) for row in _rows(data / "sp500_sectors/companies.jsonl")]
    names = sorted({sector for _, sector in rows})
    for name, sector in rows:
        yield _choice(draw, SECTOR, name, sector, names)


def words(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    texts = [" ".join(row["text"].split()) for row in _rows(data / "snips/train.jsonl.gz")]
    tasks: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("How many words are in this: {}", lambda text: str(len(text.split()))),
        ("Say this again: {}", lambda text: text),
        ("Write this in capital letters: {}", str.upper),
        ("What is the first word of this: {}", lambda text: text.split()[0]),
        ("What is the last word of this: {}", lambda text: text.split()[-1]),
    )
    for text in draw.sample(sorted(set(texts)), 1500):
        asked, answer = draw.choice(tasks)
        yield _asked(asked.format(text), answer(text))


def sums(data: Path, draw: random.Random) -> Iterator[list[Row]]:
    questions = {(sign, a, b) for a in range(100) for b in range(100) for sign in "+-" if sign == "+" or a >= b}
    for sign, a, b in draw.sample(sorted(questions), 1500):
        asked = draw.choice(("What is {} {} {}?", "{} {} {} = ?", "Work out {} {} {}."))
        yield _asked(asked.format(a, sign, b), str(a + b if sign == "+" else a - b))


MAKERS: dict[str, Callable[[Path, random.Random], Iterator[list[Row]]]] = {
    make.__name__: make
    for make in (seeds, oasst, glaive, gsm8k, clinc150, banking77, snips, goemotions, sectors, words, sums)
}


# -- rows ----------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _asked(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]


def _choice(
    draw: random.Random, asked: Sequence[str], text: str, label: str, names: Sequence[str], among: int = OPTIONS
) -> list[Row]:
    """A question with the right name among others, in any order; where no name is right, NONE comes last and is."""
    others = draw.sample([name for name in names if name != label], among - (label in names))
    options = [*others, label] if label in names else others
    draw.shuffle(options)
    spelled = [_plain(name) for name in options] + [NONE] * (label == NONE or draw.random() < 0.1)
    listed = f"{', '.join(spelled[:-1])} or {spelled[-1]}"
    return _asked(draw.choice(asked).format(text=text.strip(), options=listed), _plain(label))


def _until(turns: list[Row], fits: Callable[[list[Row]], bool]) -> list[Row]:
    """As many turns from the beginning as fit and end with an answer."""
    ends = [k for k, turn in enumerate(turns, 1) if turn["role"] == "assistant" and fits(turns[:k])]
    return turns[: max(ends, default=0)]


def _plain(name: str) -> str:
    return name.replace("_", " ").strip()


def _spaced(name: str) -> str:
    """`SearchScreeningEvent` -> `search screening event`"""
    return " ".join(re.findall(r"[A-Z][a-z]*", name)).lower()


def _size(turns: Sequence[Row]) -> int:
    return sum(len(turn["content"]) for turn in turns)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python zoo/instruct_data.py DATA OUTPUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
