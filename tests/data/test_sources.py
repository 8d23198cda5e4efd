from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from pegbox.core.errors import DataError
from pegbox.data.sources import load_records


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(source: object, **options: object) -> list[object]:
    return [found.row and found.row.get("text") for found in load_records(source, **options)]  # type: ignore[arg-type]


def test_lists_paths_globs_and_generators(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "1", "2"), write(tmp_path / "b.jsonl", "3")
    assert texts([{"text": "x"}, {"text": "y"}]) == ["x", "y"]
    assert texts({"text": name} for name in "xy") == ["x", "y"]
    assert texts(a) == texts(str(a)) == ["1", "2"]
    assert texts([a, b]) == texts(str(tmp_path / "*.jsonl")) == ["1", "2", "3"]
    assert texts(a, limit=1) == ["1"]


def test_something_that_is_no_row_keeps_its_place() -> None:
    found = list(load_records([{"text": "x"}, "y", None]))
    assert [record.row for record in found] == [{"text": "x"}, None, None]
    assert [record.line for record in found] == [1, 2, 3]


def test_provenance_names_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "de" / "a.jsonl", "1")
    write(tmp_path / "en" / "a.jsonl", "2", "3")
    assert [(found.source, found.line) for found in load_records(tmp_path)] == [
        ("de/a.jsonl", 1),
        ("en/a.jsonl", 1),
        ("en/a.jsonl", 2),
    ]


def test_a_folder_gives_its_training_split_unless_another_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", "1")
    write(tmp_path / "train-00001-of-00002.jsonl", "2")
    write(tmp_path / "dev.jsonl", "3")
    write(tmp_path / "test" / "part.jsonl", "4")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    assert texts(tmp_path) == texts(tmp_path, split="train") == ["1", "2"]
    assert texts(tmp_path, split="validation") == texts(tmp_path, split="dev") == ["3"]
    assert texts(tmp_path, split="test") == ["4"]
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        texts(tmp_path, split="tset")


def test_a_folder_of_tests_alone_is_not_trained_on_by_accident(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", "1")
    with pytest.raises(DataError, match="no split was named and there is no 'train'; one of: test"):
        texts(tmp_path)


def test_one_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no split 'test'"):
        texts(write(tmp_path / "a.jsonl", "1"), split="test")


@pytest.mark.parametrize("kind", ["missing.jsonl", "./missing", "deep/er/missing"])
def test_a_missing_path_names_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write(tmp_path / "missin.jsonl", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        texts(kind)
    with pytest.raises(DataError, match=r"nearest in .*: missin\.jsonl"):
        texts("missing.jsonl")


def test_a_hub_id_that_cannot_be_loaded_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"'ovner/name': no file or folder .*nearest in \.: owner.* as a hub id it could"
    ):
        texts("ovner/name")


def test_datasets_objects_give_class_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        | {"tags": datasets.List(datasets.ClassLabel(names=["O", "B"]))}
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1], "tags": [[0, 1], [1], []]}
    table = datasets.Dataset.from_dict(rows, features=features)
    expected = [("neg", ["O", "B"]), ("pos", ["B"]), (None, [])]
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    split = datasets.DatasetDict({"train": table, "test": table.select([0])})
    for source in (table, table.to_iterable_dataset(), split, tmp_path / "rows.parquet", tmp_path / "saved"):
        found = [record.row for record in load_records(source)]
        assert [(row["label"], row["tags"]) for row in found if row] == expected
    assert texts(split, split="test") == ["a"]


def test_columns_are_renamed_dropped_and_checked() -> None:
    rows = [{"body": "a", "text": "title", "label": 1}]
    (found,) = load_records(rows, columns={"body": "text", "label": None})
    assert found.row == {"text": "a"}
    with pytest.raises(DataError, match="no column 'bodi' to rename; did you mean 'body'"):
        load_records(rows, columns={"bodi": "text"})


@pytest.mark.parametrize("source", [{"text": ["a"]}, 3])
def test_objects_without_rows_are_refused(source: object) -> None:
    with pytest.raises(DataError, match="cannot read rows from a"):
        load_records(source)  # type: ignore[arg-type]
