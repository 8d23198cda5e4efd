from __future__ import annotations

import json
from pathlib import Path

import pytest

from pegbox.core.errors import DataError
from pegbox.data.examples import read

REGISTRY = {
    "plain": {"file_name": "plain.json"},
    "renamed": {
        "file_name": "renamed.jsonl",
        "columns": {"prompt": "frage", "query": "", "response": "antwort", "system": "rolle", "history": "vorher"},
    },
    "talk": {
        "file_name": "talk.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "kto_tag": "good"},
        "tags": {
            "role_tag": "who",
            "content_tag": "said",
            "user_tag": "customer",
            "assistant_tag": "clerk",
            "system_tag": "house",
        },
    },
    "ranked": {
        "file_name": "ranked.json",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "num_samples": 1,
    },
    "remote": {"hf_hub_url": "owner/name", "subset": "small"},
}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    def put(name: str, value: object) -> None:
        (tmp_path / name).write_text(json.dumps(value))

    put("dataset_info.json", REGISTRY)
    put("plain.json", [{"instruction": "Add.", "input": "1 1", "output": "2"}])
    put("renamed.jsonl", {"frage": "Wer?", "antwort": "Ich.", "rolle": "Kurz.", "vorher": [["Ja?", "Nein."]], "n": 1})
    turns = [{"who": "house", "said": "Be kind."}, {"who": "customer", "said": "Hi"}, {"who": "clerk", "said": "Ho"}]
    put("talk.json", [{"talk": turns, "good": True}, {"talk": turns[1:], "good": False}])
    put("ranked.json", [{"q": "Pick.", "good": "A", "bad": "B"}, {"q": "Pick again.", "good": "A", "bad": "B"}])
    return tmp_path / "dataset_info.json"


def test_entries_are_read_under_their_own_names(registry: Path) -> None:
    (plain,) = read(f"{registry}:plain")
    assert [turn["content"] for turn in plain["messages"]] == ["Add.\n1 1", "2"]
    (renamed,) = read(registry.parent / "renamed")
    assert [turn["content"] for turn in renamed["messages"]] == ["Kurz.", "Ja?", "Nein.", "Wer?", "Ich."]
    talk = read(f"{registry}:talk")
    assert talk.kind == "unpaired"
    assert [turn["role"] for turn in talk[0]["prompt"]] == ["system", "user"]
    ranked = read(f"{registry}:ranked")
    assert (ranked.kind, len(ranked)) == ("preference", 1)


def test_an_entry_must_be_named_and_known(registry: Path) -> None:
    for source in (registry, registry.parent):
        with pytest.raises(DataError, match=r"name one of its sets.*one of: plain, ranked"):
            read(source)
    with pytest.raises(DataError, match="no set 'tolk'; did you mean 'talk'"):
        read(f"{registry}:tolk")
    with pytest.raises(DataError, match="'owner/name:small': no file"):
        read(f"{registry}:remote")
