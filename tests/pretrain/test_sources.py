from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain.settings import SourceSettings
from pegbox.pretrain.sources import PIECE, Text, texts


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read(path: str, root: Path, **settings: Any) -> list[Text]:
    return list(texts("some", SourceSettings(path=path, **settings), root))


def test_rows_become_texts_by_their_columns(tmp_path: Path) -> None:
    rows = [{"context": "a {x}", "target": "b", "n": 1}, {"context": "c", "target": "d", "n": 2}]
    jsonl(tmp_path / "code.jsonl", rows)
    found = read("code.jsonl", tmp_path, text="{n}: {context}|{target}")
    assert [(text.text, text.key) for text in found] == [("1: a {x}|b", "code.jsonl:1"), ("2: c|d", "code.jsonl:2")]
    assert len(read("code.jsonl", tmp_path, text="{context}", limit=1)) == 1


def test_rows_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "some.jsonl", [{"text": "fine"}, "{broken", {"text": None}, {"other": 1}, {"text": ["a"]}])
    problems = [text.problem for text in read("some.jsonl", tmp_path)]
    assert problems == [None, "not JSON", "no text", "no text", "text is not text"]


def test_plain_text_comes_in_pieces_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}.\n" + "  It goes on.\n" * 100 for i in range(20)]
    whole = "\n".join(paragraphs)
    with gzip.open(tmp_path / "book.md.gz", "wt") as file:
        file.write(whole)
    found = read("book.md.gz", tmp_path)
    assert "\n\n".join(text.text for text in found) == whole.rstrip("\n")
    assert all(PIECE <= len(text.text) < PIECE + 1500 for text in found[:-1])
    lines = whole.split("\n")
    assert [lines[int(text.key.split(":")[1]) - 1] for text in found] == [text.text.split("\n")[0] for text in found]


def test_plain_text_ends_where_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "tales.txt").write_text("One.\n<|endoftext|>\nTwo.\n\nStill two.\n\n<|endoftext|>\n\nThree.\n")
    (tmp_path / "lines.txt").write_text("One line.\nAnother.\n")
    assert [(text.text, text.key) for text in read("tales.txt", tmp_path)] == [
        ("One.", "tales.txt:1"),
        ("Two.\n\nStill two.", "tales.txt:3"),
        ("Three.", "tales.txt:9"),
    ]
    assert [text.text for text in read("lines.txt", tmp_path)] == ["One line.\nAnother."]


def test_a_folder_of_markdown(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("a", "b", "README"):
        (tmp_path / "notes" / f"{name}.md").write_text(f"From {name}.")
    assert [text.text for text in read("notes", tmp_path)] == ["From a.", "From b."]
    jsonl(tmp_path / "notes" / "data.jsonl", [{"text": "row"}])
    assert [text.text for text in read("notes", tmp_path)] == ["row"], "Markdown beside data is about it"


def test_mistakes_are_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "some.jsonl", [{"body": "x"}] * 2000)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes("Schön.\n\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"some\.text: no row has a column 'bdy'; did you mean 'body'\?"):
        read("some.jsonl", tmp_path, text="{bdy}")
    with pytest.raises(DataError, match=r"some: empty\.jsonl holds no text"):
        read("empty.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"latin\.txt, line 1: not UTF-8"):
        read("latin.txt", tmp_path)
    with pytest.raises(SettingsError, match="names no column"):
        read("some.jsonl", tmp_path, text="text")
    with pytest.raises(DataError, match=r"no such file.*nearest.*some\.jsonl"):
        texts("some", SourceSettings(path="sone.jsonl"), tmp_path)  # before a text is asked for
