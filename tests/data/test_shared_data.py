"""Real files: what they are recognised as, and that every row is accounted for."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pegbox.data.examples import read

# file, layout, rows, rejected rows
FILES = [
    ("llamafactory_demo/alpaca_en_demo.jsonl.gz", "alpaca", 700, 0),
    ("llamafactory_demo/alpaca_zh_demo.jsonl.gz", "alpaca", 500, 0),
    ("llamafactory_demo/dpo_en_demo.jsonl.gz", "preference", 201, 0),
    ("llamafactory_demo/glaive_toolcall_en_demo.jsonl.gz", "ShareGPT", 240, 0),
    ("llamafactory_demo/kto_en_demo.jsonl.gz", "unpaired (KTO), conversation", 227, 0),
    ("oasst/conversations.jsonl.gz", "messages", 147, 0),
    ("oasst/multilingual.jsonl.gz", "messages", 410, 0),
    ("oasst/preferences.jsonl.gz", "preference", 320, 1),
    ("dolly_3k/train.jsonl.gz", "alpaca", 1959, 0),
    ("alpaca_9k/test.jsonl", "alpaca", 500, 0),
    ("alpaca_zh/test.jsonl", "alpaca", 300, 0),
    ("banking77/train.jsonl.gz", "text classification", 10003, 0),
    ("clinc150/val.jsonl.gz", "text classification", 3100, 0),
    ("goemotions/dev.jsonl", "text classification", 1000, 0),
    ("sst2/dev.jsonl", "text classification", 872, 0),
    ("rte/dev.jsonl", "text pair classification (sentence1, sentence2)", 153, 0),
    ("americasnli/dev.jsonl.gz", "text pair classification (premise, hypothesis)", 2229, 0),
    ("masakhaner/hau_dev.txt", "token classification", 100, 0),
    ("ud_treebanks/mt_mudt-dev.conllu.gz", "token classification", 120, 0),
    ("alpacaeval_prefs/test.jsonl.gz", "preference", 391, 0),
    ("gsm8k/test.jsonl.gz", "query-response", 862, 0),
    ("wikitext2/valid.txt.gz", "plain text", 1160, 0),
    ("tiny_shakespeare/validation.txt", "plain text", 940, 0),
]


@pytest.mark.parametrize(("name", "layout", "rows", "rejected"), FILES, ids=[name for name, *_ in FILES])
def test_a_real_file(shared_data: Path, name: str, layout: str, rows: int, rejected: int) -> None:
    examples = read(shared_data / name)
    counts = examples.counts
    assert examples.format.name == layout
    assert (counts.read, counts.rejected) == (rows, rejected)
    assert counts.read == counts.used + counts.rejected
    assert len({example["id"] for example in examples}) == len(examples) == counts.used
    if ".jsonl" in name:
        content = (shared_data / name).read_bytes()
        lines = gzip.decompress(content) if name.endswith(".gz") else content
        assert counts.read == len(lines.splitlines())


def test_a_real_folder(shared_data: Path) -> None:
    train, test = read(shared_data / "masakhaner"), read(shared_data / "masakhaner", split="test")
    assert (len(train), len(test)) == (6 * 400, 875)
    assert read(shared_data / "banking77", split="test").counts.read == 2035


def test_tool_dialogues_become_messages(shared_data: Path) -> None:
    examples = read(shared_data / "llamafactory_demo" / "glaive_toolcall_en_demo.jsonl.gz")
    first = next(iter(examples))
    assert [turn["role"] for turn in first["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    call = first["messages"][1]["tool_calls"][0]["function"]
    assert call == {"name": "calculate_tip", "arguments": {"bill_amount": 50, "tip_percentage": 15}}
    assert [tool["function"]["name"] for tool in first["tools"]] == ["calculate_tip", "calculate_bmi"]
    renamed = {"train_messages": "messages"}
    toolbench = read(shared_data / "toolbench" / "answers.jsonl", columns=renamed)
    assert toolbench.format.name == "messages"
    assert (toolbench.counts.read, dict(toolbench.rejected.reasons)) == (10, {"no assistant turn": 2})
    assert next(iter(toolbench))["tools"]
