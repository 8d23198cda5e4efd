"""A user's mistake: one line that names it and the nearest right thing, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

MISTAKES = {
    "unknown verb": (("trian",), "did you mean 'train'"),
    "unknown key": (("train", "model=x", "data=y", "modle=z"), "did you mean 'model'"),
    "unknown method": (("train", "model=x", "data=y", "method=lorra"), "did you mean 'lora'"),
    "unknown setting of a method": (("train", "model=x", "data=y", "method.ranc=3"), "did you mean 'rank'"),
    "wrong type": (("train", "model=x", "data=y", "learning_rate=fast"), "must be a number, got 'fast'"),
    "out of range": (("train", "model=x", "data=y", "learning_rate=-1"), "must be above 0, got -1"),
    "no model": (("train", "data=y"), "train needs model="),
    "no equals sign": (("train", "model", "x"), "expected key=value, got 'model'"),
    "a second bare word": (("merge", "out", "merged"), "got 'merged', as in `adapter=... output=...`"),
    "a bare word that is no adapter": (("merge", "nothing", "output=x"), "nothing holds no adapter"),
    "a bare word that is no model": (("inspect", "./nothing"), "there is no model folder 'nothing'"),
    "no recipe": (("train", "nothing.yaml"), "there is no recipe 'nothing.yaml'"),
    "no data": (("train", "model=minilm", "data=nothing.jsonl"), "no such file"),
    "no adapter": (("merge", "adapter=nothing", "output=x"), "holds no adapter"),
    "format of merge": (("merge", "adapter=a", "output=b", "format=peft"), "merge takes no 'format'"),
    "one of two": (("generate", "prompt=hello"), "generate needs adapter= or model="),
    "no method of this name": (("methods", "lorra"), "did you mean 'lora'"),
    "no method file": (("check", "nothing.py"), "there is no method file"),
    "no argument": (("check",), "Missing argument"),
    "unknown option": (("methods", "--jsn"), "--jsn"),
    "compare one method": (("compare", "model=x", "data=y", "method=lora"), "methods=lora,full"),
    "compare one rate": (("compare", "model=x", "data=y", "learning_rate=1"), "rates.lora"),
    "settings of a method that is not there": (("compare", "model=x", "data=y", "dora.rank=3"), "is not compared"),
    "unknown setting of a compared method": (("compare", "model=x", "data=y", "lora.ranc=3"), "did you mean 'rank'"),
    "data check of nothing": (("data", "check"), "data check needs data="),
    "data of nothing": (("data", "chek"), "chek"),
    "settings without a method": (("inspect", "model=minilm", "method.rank=3"), "give method=NAME"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, pegbox: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, told = MISTAKES[name]
    ran = pegbox(*words)
    assert ran.code == 2, ran
    assert told in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(("text", "told"), [("a: [1", "is not YAML"), ("- 1\n- 2", "must hold `key: value` lines")])
def test_broken_recipes(text: str, told: str, pegbox: Callable[..., Ran], tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    ran = pegbox("train", str(recipe))
    assert ran.code == 2
    assert told in ran.err
    assert ran.err.count("\n") == 1


def test_interruption_has_a_code_of_its_own(pegbox: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pegbox.catalogue.summary_table", interrupted)
    ran = pegbox("methods")
    assert (ran.code, ran.err) == (130, "interrupted\n")
