"""`pegbox pretrain`: where paths start from, and mistakes in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

RECIPE = """\
sources: {stories: stories.txt}
model: {hidden: 32, layers: 2}
train: {steps: 4, batch: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe beside its text, and another folder to run it from."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "stories.txt").write_text("Once upon a time there was a peg in a box.\n" * 9)
    (tmp_path / "texts" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "texts" / "recipe.yaml"


def test_texts_lie_beside_the_recipe(recipe: Path, pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("pretrain", "../texts/recipe.yaml", "dry_run=true", "train.steps=5")
    assert ran.code == 0, ran.err
    assert "sources.stories: 'Once upon a time" in ran.out
    assert "5 steps" in ran.out


def test_or_where_root_says(recipe: Path, pegbox: Callable[..., Ran]) -> None:
    recipe.rename(recipe.parent.parent / "recipe.yaml")
    assert "stories.txt" in pegbox("pretrain", "../recipe.yaml", "dry_run=true").err
    assert pegbox("pretrain", "../recipe.yaml", "dry_run=true", "root=../texts").code == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.step=5", "train has no setting 'step'; did you mean 'steps'"),
        ("trian.steps=5", "recipe has no setting 'trian'; did you mean 'train'"),
        ("model.layers=0", "model.layers must be at least 1, got 0"),
        ("model.heads=3", "model.hidden 32 must be a multiple"),
        ("sources.stories.text={body}", "no row has a column 'body'"),
        ("sources.more.weight=2", "sources.more has no path; give sources.more.path=FILE"),
        ("tokenizer.size=100", "tokenizer.size is 100, below the 256 bytes"),
        ("instruct.data=none.jsonl", "none.jsonl"),
        ("instruct.select=middle", "instruct.select must be one of 'all', 'band'"),
    ],
)
def test_a_mistake_is_told_in_one_line(word: str, said: str, recipe: Path, pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("pretrain", str(recipe), "dry_run=true", word)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_it_needs_sources(pegbox: Callable[..., Ran]) -> None:
    assert "pretrain needs sources=" in pegbox("pretrain", "train.steps=5").err
