"""The parts of the demonstration; all of it together is `make demo`."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from pegbox.core.errors import ModelError
from pegbox.recipes import demo, shipped


def test_shipped_data_is_whole_and_attributed() -> None:
    folder = shipped.data(demo.DATA)
    counts = {}
    for name in ("train", "test"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        counts[name] = len(rows)
        assert len({row["label"] for row in rows}) == 77
    assert counts == {"train": 10003, "test": 2035}
    notice = (folder / "NOTICE").read_text()
    assert "CC BY 4.0" in notice
    assert "PolyAI" in notice


def test_few_rows_of_each_class(tmp_path: Path) -> None:
    source = shipped.data(demo.DATA) / "train.jsonl.gz"
    demo.write_few(source, tmp_path / "a.jsonl", 5)
    demo.write_few(source, tmp_path / "b.jsonl", 5)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    labels = Counter(json.loads(line)["label"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert set(labels.values()) == {5}
    assert len(labels) == 77


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"another")
    monkeypatch.setattr("pegbox.train.model.locate", lambda name: str(tmp_path))
    with pytest.raises(ModelError, match="expected 53aa51172d"):
        demo.check_model()


def test_the_packaged_model_is_the_right_one() -> None:
    assert (demo.check_model() / "config.json").is_file()


def test_the_recipe_gives_every_method_the_same(tmp_path: Path) -> None:
    settings = demo.settings(tmp_path)
    assert settings.names == ("lora", "miss", "bitfit", "full")
    assert (settings.trials, settings.seeds) == (4, 3)
    assert Path(settings.test).is_file()


def test_recipes_are_settings() -> None:
    from pegbox.cli.overrides import read_yaml
    from pegbox.evaluate.compare_settings import compare_settings
    from pegbox.pretrain.settings import recipe
    from pegbox.train.settings import run_settings

    for name, path in shipped.recipes().items():
        if "sources" in read_yaml(path):
            assert recipe(read_yaml(path)).sources, name
            continue
        read = compare_settings if "trials" in read_yaml(path) else run_settings
        assert read(read_yaml(path) | {"data": name}).data == name


def test_a_sentence_is_not_asked_for_without_a_terminal() -> None:
    assert demo._asked() == demo.SENTENCE


def test_an_interrupted_demo_goes_on_and_one_of_another_recipe_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo._prepare(folder)
    (folder / "compare.json").write_text("{}")
    demo._prepare(folder)
    assert (folder / "compare.json").is_file()
    (folder / demo.RECIPE).write_text("another")
    demo._prepare(folder)
    assert not (folder / "compare.json").exists()
