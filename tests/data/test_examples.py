from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import DataError
from pegbox.data.examples import Examples, read, split

Row = dict[str, Any]
CONTENT = {"instruction": "A?", "output": "B."}


def write(path: Path, rows: list[Any], *broken: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in [*map(json.dumps, rows), *broken]))
    return path


def chats(n: int) -> list[Row]:
    return [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(n)]


def by_id(examples: Examples) -> dict[str, Row]:
    return {example["id"]: example for example in examples}


def test_the_announcement_names_format_columns_rows_and_rejects(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [row | {"topic": "x"} for row in chats(3)], "{no", '{"topic": "y"}')
    assert read(path).announcement == (
        "train.jsonl: alpaca: columns instruction, output used; topic ignored; 3 rows; "
        "2 rejected (1 not JSON, 1 instruction is missing)"
    )


def test_ids_do_not_depend_on_order_or_container(tmp_path: Path) -> None:
    rows = chats(20)
    shuffled = random.Random(0).sample(rows, 20)
    (tmp_path / "rows.csv").write_text(
        "output,instruction\n" + "".join(f"{row['output']},{row['instruction']}\n" for row in shuffled)
    )
    first = by_id(read(rows))
    assert len(first) == 20
    assert first == by_id(read(shuffled)) == by_id(read(write(tmp_path / "a.jsonl", shuffled)))
    assert first == by_id(read(tmp_path / "rows.csv"))


def test_an_id_column_is_kept_and_repeats_are_told_apart() -> None:
    rows = [{"id": 7, **CONTENT}, {"id": "b", **CONTENT}, {"id": 7, **CONTENT}, {"id": None, **CONTENT}]
    ids = [example["id"] for example in read(rows)]
    assert ids[:3] == ["7", "b", "7-2"]
    same = [example["id"] for example in read([CONTENT, CONTENT, CONTENT])]
    assert same == [ids[3], f"{ids[3]}-2", f"{ids[3]}-3"]


def test_every_row_is_used_or_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*chats(5), {"id": "x", "instruction": "A?"}, {"output": "B."}], '{"a', "[1]")
    listed = tmp_path / "out" / "rejected.jsonl"
    examples = read(path, rejected_to=listed)
    assert (examples.counts.read, examples.counts.used, examples.counts.rejected) == (9, 5, 4)
    assert len(examples) == 5
    assert len(examples.rejected) == 4
    rejects = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(r["id"], r["line"], r["reason"]) for r in rejects] == [
        ("x", 6, "output is missing"),
        (None, 7, "instruction is missing"),
        (None, 8, "not JSON"),
        (None, 9, "not an object with columns"),
    ]
    assert rejects[0]["row"] == {"id": "x", "instruction": "A?"}
    assert rejects[2]["row"].strip() == '{"a'
    assert dict(examples.rejected.reasons) == {r["reason"]: 1 for r in rejects}
    read(write(path, chats(2)), rejected_to=listed)
    assert not listed.exists()


def test_bytes_that_are_not_utf8_are_listed_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "a"}\n')
    read(path, rejected_to=tmp_path / "rejected.jsonl")
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["row"] == '{"text": "caf\udce9"}\n'


def test_strict_raises_on_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", chats(2), "{no")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not JSON: .*strict"):
        read(path, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ("{no\n", r"rows\.jsonl: none of 1 rows could be read; line 1: not JSON"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "not one usable row; 1 rejected"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.jsonl")


def test_files_of_different_layouts_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", chats(2))
    write(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"different layouts: a\.jsonl \(alpaca\), b\.jsonl \(plain text\)"):
        read(tmp_path)


def test_streaming_reads_anew_and_holds_little(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "x" * 1000} for i in range(3000)]
    path = write(tmp_path / "rows.jsonl", rows, "{no")
    del rows
    examples = read(path, streaming=True, rejected_to=tmp_path / "rejected.jsonl")
    assert examples.announcement.endswith("plain text: columns text used; streaming")
    tracemalloc.start()
    for _ in range(2):
        assert sum(1 for _ in examples) == 3000
        assert (examples.counts.read, examples.counts.used, examples.counts.rejected) == (3001, 3000, 1)
        assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # the file holds 3 MB
    with pytest.raises(TypeError, match="no length"):
        len(examples)
    with pytest.raises(TypeError, match="no order"):
        examples[0]
    with pytest.raises(DataError, match="an iterator only once"):
        read(iter([{"text": "a"}]), streaming=True)


def test_a_split_is_disjoint_complete_and_stable() -> None:
    examples = read(chats(1000))
    train, valid = split(examples, 0.1, seed=1)
    assert by_id(train) | by_id(valid) == by_id(examples)
    assert len(train) + len(valid) == 1000
    assert 70 < len(valid) < 130
    fewer = read(random.Random(0).sample(chats(500), 500))
    assert by_id(split(fewer, 0.1, seed=1)[1]).keys() == by_id(valid).keys() & by_id(fewer).keys()
    assert by_id(split(examples, 0.1, seed=2)[1]) != by_id(valid)
    assert (valid.counts.read, valid.counts.used, valid.counts.rejected) == (len(valid), len(valid), 0)


def test_duplicates_and_other_answers_stay_together() -> None:
    rows = [{"instruction": text(f"what is {i}?"), "output": str(j)} for i in range(50) for j, text in enumerate(CASES)]
    for part in split(read(rows), 0.5):
        asked = [example["messages"][0]["content"].lower() for example in part]
        assert all(asked.count(one) == 3 for one in asked)


CASES = (str, str.upper, str)


def test_both_parts_hold_something() -> None:
    for n in (2, 3, 5):
        for seed in range(5):
            train, valid = split(read(chats(n)), 0.01, seed)
            assert len(train) >= 1
            assert len(valid) >= 1
    with pytest.raises(DataError, match="cannot be told into two parts"):
        split(read([CONTENT, CONTENT]), 0.5)
    with pytest.raises(DataError, match=r"fraction 1\.5 is not between"):
        split(read(chats(2)), 1.5)


def test_a_stream_is_split_like_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", chats(300))
    for streamed, listed in zip(split(read(path, streaming=True), 0.2), split(read(path), 0.2), strict=True):
        assert list(streamed) == list(listed)
        assert streamed.counts.read == 300
