from __future__ import annotations

import json

import pytest

from pegbox.data.conversations import message, messages, text, tools, transcript
from pegbox.data.rejects import RowError

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("human", "user"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("developer", "system"),
        ("observation", "tool"),
        ("function", "tool"),
    ],
)
def test_roles_of_every_dialect(theirs: str, ours: str) -> None:
    assert message({"from": theirs, "value": "x"}) == {"role": ours, "content": "x"}


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([{"name": "add", "arguments": '{"a": 1}'}])},
        {"role": "assistant", "content": None, "tool_calls": [TOOL | {"id": "7"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_tool_calls_of_every_dialect(call: dict[str, object]) -> None:
    found = message(call)
    assert (found["role"], found["content"]) == ("assistant", "")
    assert [{k: v for k, v in one.items() if k != "id"} for one in found["tool_calls"]] == [TOOL]


def test_calls_join_the_assistant_turn_before_them() -> None:
    call = {"from": "function_call", "value": json.dumps(CALL)}
    turns = messages([{"from": "human", "value": "?"}, {"from": "gpt", "value": "Wait."}, call, call])
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert (turns[1]["content"], turns[1]["tool_calls"]) == ("Wait.", [TOOL, TOOL])
    apart = messages([{"from": "gpt", "value": "Wait.", "train": False}, call])
    assert len(apart) == 2


@pytest.mark.parametrize("flag", ["train", "loss", "weight"])
def test_training_flags(flag: str) -> None:
    assert message({"role": "assistant", "content": "x", flag: 0})["train"] is False
    assert message({"role": "assistant", "content": "x", flag: True})["train"] is True
    assert "train" not in message({"role": "assistant", "content": "x", flag: None})
    with pytest.raises(RowError, match=r"a training flag is not 0 or 1: found 0\.5"):
        message({"role": "assistant", "content": "x", flag: 0.5})


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"from": "humna", "value": "x"}, "unknown role: 'humna'; did you mean 'human'"),
        ({"content": "x"}, "a turn has no role"),
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": {"a": 1}}, "content is not text: found dict"),
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "a content part is not text: found 'image'"),
        ({"role": "function_call", "content": "{no"}, "function call is not JSON"),
        ({"role": "function_call", "content": '{"arguments": {}}'}, "a function call has no name"),
        ("hello", "a turn is not an object: found str"),
    ],
)
def test_what_a_turn_lacks_is_said(turn: object, why: str) -> None:
    with pytest.raises(RowError, match=why):
        message(turn)


def test_text_parts_are_joined_and_json_strings_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts}]
    assert messages(json.dumps(turns)) == [{"role": "user", "content": "ab"}]


def test_tools_are_declared_in_one_form() -> None:
    declared = {"name": "add", "parameters": {}}
    expected = [{"type": "function", "function": declared}]
    for value in ([declared], json.dumps([declared]), [json.dumps(declared)], expected, declared):
        assert tools(value) == expected
    assert tools(None) == tools("") == tools([]) == []


def test_transcripts() -> None:
    assert transcript("\n\nHuman: Hi\n\nAssistant: Ho\n\nHa") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho\n\nHa"},
    ]
    assert transcript("No transcript.\n\nHuman: Hi") is None


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert text("naïve 👍", "x") == "naïve 👍"
    with pytest.raises(RowError, match="x is not valid Unicode"):
        text("cut \ud83d", "x")
