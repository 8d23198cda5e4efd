"""Models, data and places that do not fit: one line that says why and what can be done, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluate import tiny as more
from train.tiny import chat_file, model_folder

from .conftest import Ran

TRAIN = ("train", "model=llama", "data=chat.jsonl")
COMPARE = ("compare", "model=llama", "data=chat.jsonl", "methods=lora,miss", "trials=1", "seeds=1", "max_steps=1")
MISTAKES = {
    "a folder misspelt": (("train", "model=lama", "data=chat.jsonl"), "did you mean 'llama'"),
    "damaged weights": (("train", "model=cut", "data=chat.jsonl"), "weights are damaged"),
    "no form for the objective": (("train", "model=vit", "data=chat.jsonl"), "it has for image_classification"),
    "a model that sees what it should foretell": (("train", "model=bert", "data=chat.jsonl"), "would teach it to copy"),
    "no tokenizer": (("train", "model=mute", "data=chat.jsonl"), "has no tokenizer beside it"),
    "no rows": (("train", "model=llama", "data=empty.jsonl"), "empty.jsonl holds no rows"),
    "an output that is a file": ((*TRAIN, "output=chat.jsonl"), "output 'chat.jsonl' cannot be a folder"),
    "a recipe that is no text": (("train", "binary.yaml"), "binary.yaml is not YAML"),
    "a number for names": ((*TRAIN, "columns=3"), "run.columns must be names with text each, got 3"),
    "an unknown tracker": ((*TRAIN, "report_to=wandbb"), "did you mean 'wandb'"),
    "a wrong argument": ((*TRAIN, "args.seed=x"), "args.seed must be a whole number, got 'x'"),
    "an unknown metric": ((*TRAIN, "valid=chat.jsonl", "best=nll_", "max_steps=1"), "did you mean 'nll'"),
    "evaluation of damaged weights": (("eval", "cut", "data=chat.jsonl"), "weights are damaged"),
    "an objective that the data does not fit": (("eval", "llama", "data=chat.jsonl", "objective=dpo"), "does not fit"),
    "texts for a model of images": (("eval", "vit", "data=chat.jsonl"), "reads images"),
    "masks by a model of images": (("data", "check", "chat.jsonl", "model=vit"), "there is no tokenizer at 'vit'"),
    "a rate below zero": ((*COMPARE, "rates.miss=-1"), "rates.miss must be above 0"),
    "a rank that does not fit": ((*COMPARE, "miss.rank=999"), "miss: rank must be 1..32"),
    "answers to nowhere": (("generate", "llama", "data=ask.jsonl", "output=chat.jsonl/x"), "cannot be a folder"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model_folder(folder / "llama")
    model_folder(folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    model_folder(folder / "bert", more.bert())
    more.llama().save_pretrained(folder / "mute")
    _images(folder / "vit")
    chat_file(folder / "chat.jsonl")
    (folder / "ask.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return folder


def _images(folder: Path) -> None:
    from transformers import ViTImageProcessorPil

    more.vit().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_inputs(name: str, place: Path, pegbox: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words, told = MISTAKES[name]
    ran = pegbox(*words, *(() if any(w.startswith("output=") for w in words) or words[0] != "train" else ("output=o",)))
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert (ran.code, len(errors)) == (2, 1), ran
    assert told in errors[0]
