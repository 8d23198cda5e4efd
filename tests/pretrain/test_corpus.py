from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain import corpus
from pegbox.pretrain.corpus import Corpus, build
from pegbox.pretrain.settings import recipe

VOCABULARY = ["river", "garden", "winter", "letter", "morning", "shadow", "kitchen", "window", "market", "bridge"]


def prose(seed: int, length: int = 80) -> str:
    draw = random.Random(seed)
    words = [draw.choice(VOCABULARY) + draw.choice(["", "s", "ed", "ing", "ly"]) for _ in range(length)]
    return f"Text {seed}: the " + " ".join(words) + ", and that was all."


def jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def built(folder: Path, **values: Any) -> tuple[Corpus, list[str]]:
    said: list[str] = []
    values = {"output": str(folder / "out"), "sources": {"a": "a.jsonl", "b": "b.jsonl"}, **values}
    return build(recipe(values), folder, said.append), said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(20)])
    jsonl(tmp_path / "b.jsonl", [prose(i) for i in range(20, 30)])
    jsonl(tmp_path / "held.jsonl", [prose(i) for i in range(50, 53)])
    return tmp_path


def test_a_copy_in_another_source_is_dropped_once(folder: Path) -> None:
    near = prose(4, 200).replace("river", "stream", 1)
    jsonl(folder / "a.jsonl", [prose(0), prose(1), prose(4, 200)])
    jsonl(folder / "b.jsonl", [prose(2), prose(1).upper().replace(" ", "  "), near, prose(3)])
    made, said = built(folder)
    assert list(made.texts("a")) == [prose(0), prose(1), prose(4, 200)]
    assert list(made.texts("b")) == [prose(2), prose(3)]
    report = made.report["sources"]["b"]
    assert (report["read"], report["kept"]) == (4, 2)
    assert report["dropped"] == {"exact duplicate": 1, "near duplicate": 1}
    dropped = [json.loads(line) for line in (folder / "out/corpus/dropped/b.jsonl").read_text().splitlines()]
    assert [row["like"] for row in dropped] == [None, "a/a.jsonl:3"]
    assert said[1].startswith("b: 2 of 4 texts kept")
    assert said[1].endswith("dropped: 1 exact duplicate, 1 near duplicate")


def test_every_row_is_accounted_for(folder: Path) -> None:
    text = f"<p>{prose(1)}</p>"
    rows = [json.dumps({"text": text}), "{", json.dumps({"text": "short"}), json.dumps({"text": prose(0)})]
    (folder / "a.jsonl").write_text("\n".join(rows))
    made, _ = built(folder, sources={"a": "a.jsonl"})
    entry = made.report["sources"]["a"]
    assert entry["read"] == entry["kept"] + sum(entry["dropped"].values()) == 4
    assert entry["dropped"] == {"not JSON": 1, "short": 1}
    assert entry["bytes_read"] - entry["bytes_kept"] == len("<p></p>short")
    kept = [json.loads(line) for line in made.files["a"].read_text().splitlines()]
    assert kept == [{"text": prose(1), "key": "a.jsonl:1"}, {"text": prose(0), "key": "a.jsonl:4"}]


def test_what_is_held_out_is_not_trained_on(folder: Path) -> None:
    leak = prose(90, 30) + " " + prose(51)[50:300] + " " + prose(91, 30)
    jsonl(folder / "b.jsonl", [prose(20), leak, prose(21)])
    made, _ = built(folder, held_out={"held": "held.jsonl"})
    assert made.report["sources"]["b"]["dropped"] == {"held out": 1}
    assert list(made.held_out_texts("held")) == [prose(i) for i in range(50, 53)]
    unchecked, _ = built(folder, held_out={"held": "held.jsonl"}, duplicates={"held_out": None})
    assert unchecked.report["sources"]["b"]["dropped"] == {}


def test_a_corpus_of_what_was_kept_is_the_same(folder: Path) -> None:
    odd = ["<b>" + prose(7) + "</b>", prose(8) + "\n\n" + prose(8), prose(8), "tiny", prose(9, 300) + " more"]
    jsonl(folder / "b.jsonl", [*odd, prose(9, 300), *(prose(i) for i in range(18, 25))])
    first, _ = built(folder)
    kept = {name: list(first.texts(name)) for name in first.files}
    for name, texts in kept.items():
        jsonl(folder / f"{name}.jsonl", texts)
    again, _ = built(folder, output=str(folder / "again"))
    assert {name: list(again.texts(name)) for name in again.files} == kept


def test_code_survives_where_its_source_says_so(folder: Path) -> None:
    code = "".join(f"def f{i}(x):\n    return {{'<b>': x[{i}]}}\n\n\n" for i in range(9)).strip()
    jsonl(folder / "b.jsonl", [code])
    with pytest.raises(DataError, match="b: none of 1 texts is kept; 1 braces"):
        built(folder)
    source = {"path": "b.jsonl", "clean": {"quality": False, "markup": False, "repeats": 1.0}}
    made, _ = built(folder, sources={"a": "a.jsonl", "b": source})
    assert list(made.texts("b")) == [code]
    with pytest.raises(SettingsError, match=r"sources\.b\.clean has no setting 'qualty'; did you mean 'quality'"):
        built(folder, sources={"b": {"path": "b.jsonl", "clean": {"qualty": False}}})


def test_a_broken_off_run_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(folder / "b.jsonl", [prose(3), prose(20), prose(51)])
    held_out = {"held": "held.jsonl"}
    whole, _ = built(folder, output=str(folder / "whole"), held_out=held_out)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_refined", _interrupted_in_b)
        with pytest.raises(KeyboardInterrupt):
            built(folder, held_out=held_out)
    resumed, said = built(folder, held_out=held_out)
    assert [line.endswith("(done before)") for line in said] == [True, True, False]
    assert resumed.report == whole.report
    for name in ("a", "b"):
        assert resumed.files[name].read_bytes() == whole.files[name].read_bytes()
    assert all(line.endswith("(done before)") for line in built(folder, held_out=held_out)[1])
    jsonl(folder / "a.jsonl", [prose(0)])  # all that follows is made anew
    assert not any("a:" in line and "before" in line for line in built(folder, held_out=held_out)[1][1:])


def _interrupted_in_b(text: Any, job: Any, seen: Any, refined: Any = corpus._refined) -> Any:
    if job.name == "b" and text.key.endswith(":2"):
        raise KeyboardInterrupt
    return refined(text, job, seen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {}}, "no sources"),
        ({"sources": {"a/b": "a.jsonl"}}, "cannot be called 'a/b'"),
        ({"clean": {"language": "english"}}, "unknown code 'english'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        built(folder, **values)
    assert not (folder / "out").exists()
