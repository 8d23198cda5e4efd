from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pegbox.core.errors import DataError
from pegbox.data.readers import Record, read_file

ROWS = [{"text": "one"}, {"text": "zwei, drei"}, {"text": 'qu"atre\ncinq'}, {"text": "шесть 七"}]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(path: Path) -> list[object]:
    return [found.row for found in read_file(path)]


def broken(path: Path) -> list[Record]:
    return [found for found in read_file(path) if found.row is None]


def _jsonl(path: Path) -> None:
    path.write_text(lines(ROWS), encoding="utf-8")


def _json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def _instances(path: Path) -> None:
    path.write_text(json.dumps({"type": "text_only", "instances": ROWS}), encoding="utf-8")


def _data(path: Path) -> None:
    path.write_text(json.dumps({"data": ROWS}, indent=1), encoding="utf-8")


def _csv(path: Path) -> None:
    quoted = ['"' + row["text"].replace('"', '""') + '"' for row in ROWS]
    path.write_text("text\n" + "\n".join(quoted) + "\n", encoding="utf-8", newline="")


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def _arrow_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def _arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", _jsonl),
        ("lines-under-another.json", _jsonl),
        ("list.json", _json_list),
        ("lmflow.json", _instances),
        ("data.json", _data),
        ("rows.csv", _csv),
        ("rows.tsv", _csv),
        ("rows.parquet", _parquet),
        ("stream.arrow", _arrow_stream),
        ("file.arrow", _arrow_file),
    ],
)
def test_every_container_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None], zipped: bool
) -> None:
    path = tmp_path / name
    write(path)
    if zipped:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / f"{name}.gz"
    assert rows_of(path) == ROWS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'["a", "list"]', "not an object with columns"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_json_line_keeps_its_place_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    found = list(read_file(path))
    assert [record.row for record in found] == [{"text": "a"}, None, {"text": "b"}]
    assert [record.line for record in found] == [1, 3, 4]
    assert found[1].problem is not None
    assert found[1].problem.reason == reason


def test_csv_rows_that_do_not_fit_the_header_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",1\nonly one\na,b,c\nlast,0\n')
    found = list(read_file(path))
    assert [record.line for record in found] == [2, 4, 5, 6]
    assert [record.row is None for record in found] == [False, True, True, False]
    assert str(found[1].problem) == "wrong number of fields: 1 where the header has 2"


def test_a_quote_never_closed_is_one_rejected_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,1\n"open,1\nc,1\n')
    assert rows_of(path)[0] == {"text": "a", "label": "1"}
    assert [str(record.problem) for record in broken(path)] == ["not CSV: unexpected end of data (lines 3 to 4)"]


def test_csv_knows_semicolons_byte_order_marks_utf16_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text;label\nä;1\n", encoding="utf-8-sig")
    assert rows_of(path) == [{"text": "ä", "label": "1"}]
    path.write_text("text,label\nä,1\n", encoding="utf-16")
    assert rows_of(path) == [{"text": "ä", "label": "1"}]
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert rows_of(path) == [{"text": "x" * 200_000}]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"a column twice: \['text'\]"):
        list(read_file(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", b'[{"text": "a"}, {"text": "b"', "broken or cut short after 1 rows"),
        ("no.json", b"not json at all", "not JSON, and not JSON Lines"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], "damaged or cut short"),
        ("not.jsonl.gz", b'{"text": "a"}\n', "damaged or cut short"),
        ("not.parquet", b"PAR1 no", "not Parquet, or damaged"),
        ("not.arrow", b"no arrow", "not Arrow, or damaged"),
        ("rows.jsnl", b"", r"cannot read files of type '.jsnl'; did you mean '.jsonl'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_file_without_rows_to_tell_apart_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_file(path))


def test_text_is_read_by_paragraph_and_by_line_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\nA first\nparagraph.\n\n \nA second.\n")
    assert [(found.line, found.row) for found in read_file(path)] == [
        (2, {"text": "A first\nparagraph."}),
        (6, {"text": "A second."}),
    ]
    path.write_text("one\ntwo\n")
    assert rows_of(path) == [{"text": "one"}, {"text": "two"}]


def test_conll_and_conllu(tmp_path: Path) -> None:
    path = tmp_path / "ner.txt"
    path.write_text("-DOCSTART- O\n\nAda B-PER\nslept O\n\nParis\tNNP\tB-LOC\n")
    assert rows_of(path) == [
        {"tokens": ["Ada", "slept"], "tags": ["B-PER", "O"]},
        {"tokens": ["Paris"], "tags": ["B-LOC"]},
    ]
    path = tmp_path / "ner.conll"
    path.write_text("Ada B-PER\nslept\n\nParis B-LOC\n")
    assert [record.line for record in broken(path)] == [1]
    path = tmp_path / "ud.conllu"
    word = "{}\t{}\t_\t{}\t_\t_\t0\troot\t_\t_\n"
    path.write_text("# text = du vin\n" + word.format("1-2", "du", "_") + word.format("1", "de", "ADP") + "\n1\tx\n")
    assert rows_of(path) == [{"tokens": ["de"], "tags": ["ADP"]}, None]


def test_files_are_not_held_in_memory(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "x" * 1000} for i in range(4000)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=500)
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        tracemalloc.start()
        assert sum(1 for _ in read_file(tmp_path / name)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5e6, name  # the files hold 4 MB
