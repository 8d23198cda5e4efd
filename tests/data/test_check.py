from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES
from small_tokenizers import small
from transformers import PreTrainedTokenizerFast

from pegbox.core.errors import DataError
from pegbox.data.check import check
from pegbox.data.examples import Examples, read
from pegbox.data.faults import FAULTS

Row = dict[str, Any]
TOPICS = "violin viola cello guitar lute oud sitar banjo harp zither koto mandolin ukulele bouzouki lyre".split()  # noqa: SIM905
LONG = 400  # tokens; every clean row is shorter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small("byte-level", FAMILIES["qwen"])


def chats(topics: list[str] = TOPICS) -> list[Row]:
    return [
        {"id": topic, "messages": [turn("user", f"How is a {topic} tuned?"), turn("assistant", f"The {topic}: {i}.")]}
        for i, topic in enumerate(topics)
    ]


def turn(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def classes() -> list[Row]:
    return [{"id": topic, "text": f"I play the {topic}.", "label": "ab"[i % 2]} for i, topic in enumerate(TOPICS)]


def pictures() -> list[Row]:
    import io

    import PIL.Image

    made = []
    for i, topic in enumerate(TOPICS):
        file = io.BytesIO()
        PIL.Image.new("RGB", (2, 2), (i, 0, 0)).save(file, "PNG")
        made.append({"id": topic, "image": file.getvalue(), "label": "ab"[i % 2]})
    return made


def tokenised() -> list[Row]:
    return [{"id": str(i), "input_ids": [5, 6, i], "labels": [-100, 6, i]} for i in range(7, 27)]


def prose(start: int = 0) -> str:
    return " ".join(f"{topic}{start + i}" for i in range(10) for topic in TOPICS[:3])


def chat(*turns: Row) -> Row:
    return {"id": "bad", "messages": list(turns)}


def _asked(question: str, answer: str = "So.") -> list[Row]:
    return [*chats(), chat(turn("user", question), turn("assistant", answer))]


def _near() -> list[Row]:
    return [
        *_asked("One.", prose()),
        {**chat(turn("user", "Two."), turn("assistant", prose() + " more")), "id": "bad2"},
    ]


def _relabelled(label: str, **more: str) -> list[Row]:
    return [*classes(), {"id": "bad", "text": "I play the triangle.", "label": label} | more]


# fault -> (training rows, validation rows, the faulty ids); the rest of the rows is clean
PLANTS: dict[str, tuple[list[Row], list[Row], set[str]]] = {
    "rejected": ([*chats(), {"id": "bad", "messages": None}], [], {"bad"}),
    "unencodable": ([*chats(), chat(turn("user", "A?"), turn("assistant", "B.", train=False))], [], {"bad"}),
    "target-cut": (_asked("very " * LONG), [], {"bad"}),
    "end-untrained": ([*tokenised(), {"id": "bad", "input_ids": [5, 6, 40], "labels": [5, 6, -100]}], [], {"bad"}),
    "truncated": (_asked("A?", "very " * LONG), [], {"bad"}),
    "unknown-tokens": (_asked("What does <unk> mean?"), [], {"bad"}),
    "special-in-text": (_asked("A?<|im_end|>\n<|im_start|>assistant\nB."), [], {"bad"}),
    "empty-target": (_asked("A?", " "), [], {"bad"}),
    "empty-prompt": (_asked(" "), [], {"bad"}),
    "role-order": ([*chats(), chat(*(turn("user", said) for said in "AB"), turn("assistant", "C"))], [], {"bad"}),
    "unreadable-image": ([*pictures(), {"id": "bad", "image": b"none", "label": "a"}], [], {"bad"}),
    "encoding": (_asked("Où est le dÃ©jÃ\xa0 vu?"), [], {"bad"}),
    "very-long": (_asked("A?", "x" * 9000), [], {"bad"}),
    "duplicate": ([*chats(), chats()[3] | {"id": "bad"}], [], {"bad"}),
    "near-duplicate": (_near(), [], {"bad2"}),
    "leak": (chats(), [chats()[3] | {"id": "bad"}], {"bad"}),
    "near-leak": (_asked("One.", prose()), [chat(turn("user", "Two."), turn("assistant", prose() + " more"))], {"bad"}),
    "prompt-leak": (chats(), [chat(turn("user", "How is a VIOLIN tuned?"), turn("assistant", "By ear."))], {"bad"}),
    "label-conflict": (_relabelled("b", text="I  PLAY the violin."), [], {"bad"}),
    "label-spelling": (_relabelled(" A"), [], {"bad"}),
    "label-unseen": (classes(), _relabelled("c")[-1:], {"bad"}),
    "label-single": ([row | {"label": "a"} for row in classes()], [], set(TOPICS)),
    "label-imbalance": ([row | {"label": "ab"[i == 0]} for i, row in enumerate(classes())], [], set(TOPICS[1:])),
}
# What a planted fault brings with it.
COMPANIONS = {"target-cut": {"truncated"}, "empty-target": {"unencodable"}, "label-conflict": set[str]()}


def checked(rows: list[Row], valid: list[Row], tokenizer: PreTrainedTokenizerFast | None) -> dict[str, set[str]]:
    report = check(read(rows), tokenizer, max_length=LONG, valid=read(valid) if valid else None)
    return {finding.name: set(finding.ids) for finding in report.findings}


def test_every_fault_is_planted() -> None:
    assert set(PLANTS) == set(FAULTS)


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found_and_nothing_else(fault: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows, valid, ids = PLANTS[fault]
    found = checked(rows, valid, None if fault == "very-long" else tokenizer)
    assert found[fault] == ids
    assert set(found) <= {fault} | COMPANIONS.get(fault, set())


@pytest.mark.parametrize("clean", [chats, classes, tokenised])
def test_a_clean_set_gives_none(clean: Callable[[], list[Row]], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = clean()
    assert checked(rows[:10], rows[10:], tokenizer) == checked(rows[:10], rows[10:], None) == {}


def test_tokens_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    report = check(read(tokenised()), tokenizer)
    assert (report.rows, report.tokens, report.trained_tokens) == (20, 60, 40)
    assert report.trained_share == pytest.approx(2 / 3)
    assert report.lengths == {"p50": 3, "p90": 3, "p95": 3, "p99": 3, "p100": 3}
    assert (report.unit, report.errors) == ("tokens", [])


@pytest.mark.parametrize(
    ("truncation", "lost", "cut"), [("right", 2, {"target-cut"}), ("left", 2, set()), ("drop", 5, set())]
)
def test_what_a_cut_takes(truncation: str, lost: int, cut: set[str], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*tokenised(), {"id": "bad", "input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]
    report = check(read(rows), tokenizer, max_length=3, truncation=truncation)
    assert report.lost_tokens == lost
    assert {finding.name for finding in report.findings} == {"truncated"} | cut
    assert report.tokens == (60 if truncation == "drop" else 63)


def test_labels_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    report = check(read(classes()), tokenizer)
    assert report.labels == {"a": 8, "b": 7}
    assert report.trained_share is None
    tags = [{"tokens": [topic, "is", "old"], "tags": ["B", "O", "O"]} for topic in TOPICS]
    assert check(read(tags), tokenizer).labels == {"O": 30, "B": 15}


def test_both_sides_of_a_preference_are_looked_at(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"id": topic, "prompt": f"{topic}?", "chosen": "Yes.", "rejected": f"No {i}."} for i, topic in enumerate(TOPICS)
    ]
    one = check(read(rows), tokenizer, max_length=LONG)
    assert one.findings == []
    rows[2]["rejected"] = "no " * LONG
    two = check(read(rows), tokenizer, max_length=LONG)
    assert [(finding.name, finding.ids) for finding in two.findings] == [("truncated", (TOPICS[2],))]
    assert two.tokens > one.tokens


def test_a_stream_is_checked_like_a_list(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PLANTS["role-order"][0]))
    streamed = check(read(path, streaming=True), tokenizer)
    assert streamed == check(read(path), tokenizer)


def test_the_report_as_json(tokenizer: PreTrainedTokenizerFast) -> None:
    report = json.loads(check(read(PLANTS["empty-target"][0]), tokenizer).to_json())
    assert report["rows"] == len(TOPICS) + 1
    assert 0 < report["trained_share"] < 1
    assert {finding["name"]: finding["severity"] for finding in report["findings"]} == {
        "empty-target": "error",
        "unencodable": "warning",
    }
    assert all(finding["do"] for finding in report["findings"])


def test_no_rows_to_check() -> None:
    whole = read(chats())
    empty = Examples([], whole.format, whole.counts, whole.rejected, whole.source)
    with pytest.raises(DataError, match="there are no rows to check"):
        check(empty)
