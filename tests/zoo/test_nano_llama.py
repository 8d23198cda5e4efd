"""The shipped recipe of a small base, against the data sets that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pegbox.cli.overrides import read_yaml
from pegbox.pretrain.settings import Recipe, recipe
from pegbox.pretrain.sources import texts
from zoo import instruct_data

SHARED = Path(__file__).parents[3] / "shared" / "data"
FREE = ("public domain", "MIT", "CC BY 4.0", "Apache-2.0")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not beside this checkout")


@pytest.fixture(scope="module")
def shipped() -> Recipe:
    return recipe(read_yaml(Path("nano_llama.yaml")))


def test_every_source_is_there_and_free(shipped: Recipe) -> None:
    for name, source in (*shipped.sources.items(), *shipped.held_out.items()):
        first = next(texts(name, source, SHARED))
        assert first.text, name
        assert first.problem is None
    assert all(source.licence in FREE for source in shipped.sources.values())
    assert all(source.cite for source in shipped.sources.values())
    assert sum(source.weight for source in shipped.sources.values()) == pytest.approx(1)


def test_instructions_are_short_and_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("once", "again"):
        instruct_data.main(SHARED, tmp_path / folder)
    files = sorted((tmp_path / "once").iterdir())
    assert [file.stem for file in files] == sorted(instruct_data.MAKERS)
    rows = 0
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        for turns in (json.loads(line)["messages"] for line in file.read_text().rstrip("\n").split("\n")):
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert all(turn["content"].strip() for turn in turns)
            assert sum(len(turn["content"]) for turn in turns) <= instruct_data.LONGEST
            rows += 1
    assert 20_000 < rows <= 30_000
