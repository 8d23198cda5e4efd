"""nano-llama, a decoder of eight million parameters, and nano-llama-instruct, which answers: `python -m zoo.llama`.

`pegbox pretrain nano_llama.yaml` makes both.  The first bar: all held-out texts together take MARGIN fewer bits than
the better of xz and PPMd needs, which have read the training text.  The second: of the answers to questions of sets
that it was tuned on, of splits that it was not, STOPS end by themselves and hold no other sign of the template.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pegbox.cli.overrides import read_yaml
from pegbox.core.files import CONFIG, TENSORS, read_tensors
from pegbox.evaluate.statistics import estimate
from pegbox.pretrain.report import overall
from pegbox.pretrain.run import pretrain
from pegbox.pretrain.settings import recipe
from pegbox.zoo.merged import merged
from zoo import instruct_data
from zoo.images import DATA, ROOT

NAME, CHAT = "nano-llama", "nano-llama-instruct"
RECIPE = "nano_llama.yaml"
MARGIN = 0.15  # of the better compressor's bits
STOPS = 95.0  # points
ASKED, LONGEST = 60, 200  # questions of a set; tokens of an answer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BASE = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER, "README.md", "DATA.md")

SHOWN = (
    "What is 12 + 30?",
    "Which intent is this: please wake me at seven tomorrow\nChoose from: play music, alarm, weather or translate.",
    "How many words are in this: the ship left the harbour at dawn",
    "Tom has 3 boxes with 4 pens in each. How many pens has Tom?",
)


def build(output: Path | None = None) -> dict[str, Any]:
    """Train, measure and write both models.

    Args:
        output: folder of their folders; their places in the library if None

    Returns:
        the figures of the cards.

    Raises:
        SystemExit: a bar is missed; nothing is written.
    """
    runs = ROOT / "runs" / "zoo" / NAME
    instruct_data.main(DATA, runs / "asked")
    values = {"root": str(DATA), "output": str(runs), "instruct.data": str(runs / "asked")}
    made = pretrain(recipe({**read_yaml(Path(RECIPE)), **values}))
    assert made is not None
    assert made.instruct is not None
    totals = in_all(json.loads((runs / "manifest.json").read_text())["stages"], runs)
    best = min(totals["xz"], totals["ppmd"])
    if totals["model"] > (1 - MARGIN) * best:
        raise SystemExit(f"{NAME} misses its bar, {MARGIN:.0%} below {best:.3f} bits per byte: {json.dumps(totals)}")
    ships = runs / "ships"
    _copy(made.model, ships / NAME, BASE)
    _copy(made.model, ships / CHAT, TOKENIZER)
    _pack(runs / "adapter", ships / CHAT)
    chat = merged(ships / NAME, ships / CHAT, runs / "merged")
    answers = measured(chat)
    if answers["all"]["stops"]["mean"] < STOPS:
        raise SystemExit(f"{CHAT} misses its bar: {answers['all']['stops']['mean']:.0f} % of its answers end")
    (ships / CHAT / "README.md").write_text(card(chat, answers))
    shutil.copytree(ships, output or ROOT / "src" / "pegbox" / "zoo", dirs_exist_ok=True)
    return {"bits": totals, "answers": answers}


def in_all(stages: Mapping[str, Any], runs: Path) -> dict[str, float]:
    """Bits per byte of all held-out texts together, of the model and of each compressor."""
    held_out = json.loads((runs / "corpus" / "report.json").read_text())["held_out"]
    sizes = {name: found["bytes_kept"] for name, found in held_out.items()}
    of = {"model": stages["train"]["bits"]}
    of |= {how: {name: found[how] for name, found in stages["compressors"]["bits"].items()} for how in ("xz", "ppmd")}
    totals = {who: overall(bits, sizes) for who, bits in of.items()}
    return {who: total for who, total in totals.items() if total is not None}


# -- answers -------------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By set, and of all: points of answers that end (`stops`), and that are right (`right`; of word problems by their
    last number), each with half the width of its 95 % interval over questions."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, asked in questions().items():
        replies = answered(folder, [question for question, _ in asked])
        stops = [float(ends) for _, ends in replies]
        right = [float(_core(reply) == _core(answer)) for (reply, _), (_, answer) in zip(replies, asked, strict=True)]
        found[name] = {"stops": stops, "right": right}
    found["all"] = {key: [value for of in found.values() for value in of[key]] for key in ("stops", "right")}
    return {name: {key: _points(values) for key, values in of.items()} for name, of in found.items()}


def questions() -> dict[str, list[tuple[str, str]]]:
    """ASKED questions with their answers of each set that has a split apart, and sums that were not drawn."""
    seen = {_numbers(turns) for turns in instruct_data.sums(DATA, random.Random("sums"))}
    fresh = [turns for turns in instruct_data.sums(DATA, random.Random(1)) if _numbers(turns) not in seen]
    apart = {
        "intents": instruct_data.clinc150(DATA, random.Random(1), split="test"),
        "word problems": instruct_data.gsm8k(DATA, random.Random(1), split="test"),
        "sums": iter(fresh),
    }
    return {name: _first(rows) for name, rows in apart.items()}


def _numbers(turns: list[dict[str, Any]]) -> tuple[str, ...]:
    """What a sum is about, however it is asked."""
    return (*re.findall(r"\d+|[+-]", turns[0]["content"]), turns[1]["content"])


def _first(rows: Iterator[list[dict[str, Any]]]) -> list[tuple[str, str]]:
    return [(turns[0]["content"], turns[1]["content"]) for turns, _ in zip(rows, range(ASKED), strict=False)]


@torch.no_grad()
def answered(folder: Path, asked: Sequence[str]) -> list[tuple[str, bool]]:
    """The likeliest answer to each question, and whether it ends within LONGEST tokens without other special ones."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end, special = tokenizer.convert_tokens_to_ids("<|end|>"), set(tokenizer.all_special_ids)
    special |= {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for question in asked:
        turns = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)[0, given["input_ids"].shape[1] :]
        ids = out.tolist()
        ends = ids[-1] == end and not special & set(ids[:-1])
        found.append((tokenizer.decode(ids, skip_special_tokens=True), ends))
    return found


def _core(answer: str) -> str:
    """What an answer comes down to: the number at its end, or itself."""
    text = answer.strip().rstrip(".").lower()
    return text.rpartition("the answer is ")[2]


def _points(values: Sequence[float]) -> dict[str, float]:
    found = estimate([{"hits": torch.tensor(values)}], lambda run: 100 * run["hits"].mean().item())
    return {"mean": found.mean, "half": found.half}


# -- what ships ----------------------------------------------------------------------------------------------------


def _copy(source: Path, folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)


def _pack(adapter: Path, folder: Path) -> None:
    """The adapter's files in bfloat16, on the base by its name in the zoo."""
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": NAME}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    metadata, tensors = read_tensors(adapter / TENSORS)
    header = json.loads(metadata["pegbox"]) | {"base": NAME}
    rounded = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(rounded, folder / TENSORS, metadata={"format": "pt", "pegbox": json.dumps(header)})


def card(folder: Path, answers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """README.md of the model that answers."""
    rows = [f"| {name} | {_told(of['stops'])} | {_told(of['right'])} |" for name, of in answers.items()]
    replies = [reply for reply, _ in answered(folder, SHOWN)]
    shown = [_quoted(f"**{asked}**\n\n{reply}") for asked, reply in zip(SHOWN, replies, strict=True)]
    data = [f"| {name} | {origin} | {licence} |" for name, origin, licence in ORIGINS]
    return CARD.format(
        data="\n".join(data),
        asked=ASKED,
        longest=LONGEST,
        answers="\n".join(rows),
        shown="\n\n".join(shown),
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _told(number: Mapping[str, float]) -> str:
    return f"{number['mean']:.0f} ± {number['half']:.0f}"


ORIGINS = (
    ("seeds", "Self-Instruct, the seed tasks (Wang et al., 2023, arXiv:2212.10560)", "Apache-2.0"),
    ("oasst", "OpenAssistant Conversations (Koepf et al., 2023, arXiv:2304.07327)", "Apache-2.0"),
    ("glaive", "glaive-function-calling, the turns before a call", "Apache-2.0"),
    ("gsm8k", "GSM8K, training split (Cobbe et al., 2021, arXiv:2110.14168)", "MIT"),
    ("clinc150", "CLINC150, training split (Larson et al., 2019)", "CC BY 3.0"),
    ("banking77", "BANKING77, training split (Casanueva et al., 2020)", "CC BY 4.0"),
    ("snips, words", "Snips NLU benchmark (Coucke et al., 2018, arXiv:1805.10190)", "CC0"),
    ("goemotions", "GoEmotions (Demszky et al., 2020, arXiv:2005.00547)", "Apache-2.0"),
    ("sectors", "S&P 500 companies", "PDDL"),
    ("sums", "made by zoo/instruct_data.py", "-"),
)

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: nano-llama
---

# nano-llama-instruct

nano-llama, tuned to answer: a LoRA of rank 24 on it, merged when the model is first asked for.

It knows a few kinds of short questions: which of these intents or feelings, what is named, words counted or repeated,
sums. It answers others in form only.

## Data

| what | from | licence |
|---|---|---|
{data}

Conversations of at most 1,600 characters, word problems with solutions of at most 200; the same words once.

## Template

`<|user|>`question`<|end|>` `<|assistant|>`answer`<|end|>`, as `tokenizer.apply_chat_template` makes it.

## Recipe

The second stage of `pegbox pretrain nano_llama.yaml`; from a checkout, with the data beside it:

    python -m zoo.llama

## Figures

Of {asked} questions of each of these, from splits that it has not seen, in points with 95 % intervals over questions:
answers that end by themselves within {longest} tokens, and right ones.

| questions | end | right |
|---|---:|---:|
{answers}

The likeliest answers to four more:

{shown}

## Limits

What it states is more often wrong than right. It has not been made safe. Fit for tests, examples and comparing methods.
"""


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None), indent=1))
