from __future__ import annotations

from pathlib import Path

import pytest

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
