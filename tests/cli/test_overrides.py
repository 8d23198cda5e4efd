from __future__ import annotations

from pathlib import Path

import pytest

from pegbox.cli.app import SETTINGS_VERBS
from pegbox.cli.overrides import parse, scalar
from pegbox.core.errors import SettingsError


def test_forms_of_a_setting() -> None:
    words = ["a=1", "--b=two", "--max-length", "3", "--flag", "--c=1e-3", "d=x=y"]
    assert parse(words) == {"a": 1, "b": "two", "max_length": 3, "flag": True, "c": "1e-3", "d": "x=y"}


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1\nrank: 2\n")
    assert parse([str(recipe), "rank=3", "learning_rate=4"]) == {"rank": 3, "learning_rate": 4}


def test_a_shipped_recipe_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["banking77.yaml"])["model"] == "minilm"
    with pytest.raises(SettingsError, match="shipped ones: banking77"):
        parse(["nothing.yaml"])


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("true", True), ("[1, 2]", [1, 2]), ("...", "..."), ("null", None), ("a: [", "a: [")]
)
def test_scalars(text: str, value: object) -> None:
    assert scalar(text) == value


def test_text_is_never_read_as_something_else() -> None:
    words = ["prompt=Question: why?", "model=7", "rank=7", "other=null", "data=null"]
    read = {"prompt": "Question: why?", "model": "7", "rank": 7, "other": None, "data": None}
    assert parse(words, texts=("prompt", "model", "data")) == read


def test_a_bare_first_word_is_the_subject(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("adapter: a\nrank: 2\n")
    assert parse([str(recipe), "b/", "rank=3"], subject=lambda word: "adapter") == {"adapter": "b/", "rank": 3}
    with pytest.raises(SettingsError, match="got 'c', as in `adapter=x`"):
        parse(["b/", "c"], subject=lambda word: "adapter", example="adapter=x")


def test_a_bare_word_is_an_adapter_or_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    shown = {module.VERB.name: module.VERB for module in SETTINGS_VERBS}
    assert shown["inspect"].built([str(tmp_path), "model=minilm", "method=lora"]).adapter == str(tmp_path)
    assert shown["chat"].built(["minilm"]).model == "minilm"
    assert shown["merge"].built(["anything", "output=x"]).adapter == "anything"
