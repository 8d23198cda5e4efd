from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from pegbox.core.errors import DataError
from pegbox.data.formats import recognise
from pegbox.data.layouts import LAYOUTS
from pegbox.data.rejects import RowError

Row = dict[str, Any]


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [user("Hi"), assistant("Ho")]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}

# layout, a row in it, the example it becomes
CASES: dict[str, tuple[str, Row, Row]] = {
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"messages": [user("Add.\n1 1"), assistant("2")]},
    ),
    "alpaca with system, history and an empty input": (
        "alpaca",
        {"instruction": "A?", "input": "", "output": "B.", "system": "Be kind.", "history": [["C?", "D."]]},
        {"messages": [SYSTEM, user("C?"), assistant("D."), user("A?"), assistant("B.")]},
    ),
    "dolly": (
        "alpaca",
        {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"},
        {"messages": [user("Sum up.\nLong."), assistant("Short.")]},
    ),
    "an image by its path": (
        "image classification",
        {"image": "a/b.png", "label": "cat"},
        {"image": "a/b.png", "label": "cat"},
    ),
    "an image by its bytes": (
        "image classification",
        {"img": {"bytes": b"x", "path": None}, "label": 3},
        {"image": b"x", "label": 3},
    ),
    "preference with a margin": (
        "preference",
        {"prompt": "Hi", "chosen": "Ho", "rejected": "No", "margin": 2},
        {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No")], "margin": 2.0},
    ),
    "ShareGPT": ("ShareGPT", {"conversations": SHAREGPT}, {"messages": TALK}),
    "ShareGPT with system and tools": (
        "ShareGPT",
        {
            "conversations": [
                {"from": "human", "value": "1 1"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ],
            "system": "Be kind.",
            "tools": '[{"name": "add", "parameters": {}}]',
        },
        {
            "messages": [
                SYSTEM,
                user("1 1"),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "2"},
                assistant("2"),
            ],
            "tools": [TOOL],
        },
    ),
    "messages": ("messages", {"messages": [SYSTEM, *TALK], "source": "x"}, {"messages": [SYSTEM, *TALK]}),
    "messages with flags": (
        "messages",
        {"messages": [user("Hi"), assistant("Ho", loss=0), user("Hi"), assistant("Ho", weight=1)]},
        {"messages": [user("Hi"), assistant("Ho", train=False), user("Hi"), assistant("Ho", train=True)]},
    ),
    "messages with tool calls": (
        "messages",
        {"messages": [user("1 1"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [user("1 1"), assistant("", tool_calls=[CALL])], "tools": [TOOL]},
    ),
    "LMFlow conversation": (
        "messages",
        {"conversation_id": 1, "system": "Be kind.", "messages": TALK, "tools": None},
        {"messages": [SYSTEM, *TALK]},
    ),
    "query-response": (
        "query-response",
        {"query": "A?", "response": "B.", "history": [["C?", "D."]], "system": "Be kind."},
        {"messages": [SYSTEM, user("C?"), assistant("D."), user("A?"), assistant("B.")]},
    ),
    "gsm8k": ("query-response", {"question": "A?", "answer": "B."}, {"messages": [user("A?"), assistant("B.")]}),
    "LMFlow text2text": (
        "query-response",
        {"input": "A?", "output": "B."},
        {"messages": [user("A?"), assistant("B.")]},
    ),
    "prompt-completion": (
        "prompt-completion",
        {"prompt": "A?", "completion": "B."},
        {"messages": [user("A?"), assistant("B.")]},
    ),
    "prompt-completion in turns": (
        "prompt-completion",
        {"prompt": [SYSTEM, user("Hi")], "completion": [assistant("Ho")]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "plain text": ("plain text", {"text": "Once.", "url": "x"}, {"text": "Once."}),
    "preference": (
        "preference",
        {"prompt": "A?", "chosen": "B.", "rejected": "C."},
        {"prompt": [user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "preference in turns": (
        "preference",
        {"prompt": [SYSTEM, user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
        {"prompt": [SYSTEM, user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "preference, prompt implied in turns": (
        "preference",
        {"chosen": [SYSTEM, user("A?"), assistant("B.")], "rejected": [SYSTEM, user("A?"), assistant("C.")]},
        {"prompt": [SYSTEM, user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "preference, prompt told twice": (
        "preference",
        {"prompt": "A?", "chosen": [user("A?"), assistant("B.")], "rejected": [user("A?"), assistant("C.")]},
        {"prompt": [user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "preference, hh-rlhf": (
        "preference",
        {"chosen": "\n\nHuman: A?\n\nAssistant: B.", "rejected": "\n\nHuman: A?\n\nAssistant: C."},
        {"prompt": [user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "preference, implied in text": (
        "preference",
        {"chosen": "A? B.", "rejected": "A? C."},
        {"prompt": [], "chosen": [assistant("A? B.")], "rejected": [assistant("A? C.")]},
    ),
    "preference, LLaMA-Factory": (
        "preference",
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}},
        {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No.")]},
    ),
    "preference, LMFlow": (
        "preference",
        {"chosen": {"messages": TALK}, "rejected": {"messages": [user("Hi"), assistant("No.")]}},
        {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No.")]},
    ),
    "preference, rejected_response": (
        "preference, ms-swift (rejected_response)",
        {"messages": TALK, "rejected_response": "No."},
        {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No.")]},
    ),
    "preference, rejected_messages": (
        "preference, ms-swift (rejected_messages)",
        {"messages": TALK, "rejected_messages": [user("Hi"), assistant("No.")]},
        {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No.")]},
    ),
    "preference, query and response": (
        "preference, ms-swift (query, response, rejected_response)",
        {"query": "A?", "response": "B.", "rejected_response": "C."},
        {"prompt": [user("A?")], "chosen": [assistant("B.")], "rejected": [assistant("C.")]},
    ),
    "unpaired": (
        "unpaired (KTO)",
        {"prompt": "A?", "completion": "B.", "label": True},
        {"prompt": [user("A?")], "completion": [assistant("B.")], "label": True},
    ),
    "unpaired conversation": (
        "unpaired (KTO), conversation",
        {"messages": TALK, "label": False},
        {"prompt": [user("Hi")], "completion": [assistant("Ho")], "label": False},
    ),
    "unpaired ShareGPT": (
        "unpaired (KTO), conversation",
        {"conversations": SHAREGPT, "kto_tag": True},
        {"prompt": [user("Hi")], "completion": [assistant("Ho")], "label": True},
    ),
    "unpaired alpaca": (
        "unpaired (KTO), alpaca",
        {"instruction": "A?", "output": "B.", "kto_tag": "false"},
        {"prompt": [user("A?")], "completion": [assistant("B.")], "label": False},
    ),
    "classification": ("text classification", {"text": "Good.", "label": "pos"}, {"text": "Good.", "label": "pos"}),
    "classification by number": (
        "text classification",
        {"sentence": "Good.", "label": 1},
        {"text": "Good.", "label": 1},
    ),
    "classification, several labels": (
        "text classification",
        {"text": "Good.", "labels": ["joy", "calm"]},
        {"text": "Good.", "label": ["joy", "calm"]},
    ),
    "classification of conversations": (
        "conversation classification",
        {"messages": TALK, "label": "greeting"},
        {"messages": TALK, "label": "greeting"},
    ),
    "regression": ("text classification", {"text": "Good.", "label": 4.5}, {"text": "Good.", "label": 4.5}),
    "token classification": (
        "token classification",
        {"tokens": ["Ada", "slept"], "ner_tags": [1, 0], "pos_tags": [3, 4]},
        {"tokens": ["Ada", "slept"], "tags": [1, 0]},
    ),
    "pre-tokenised": (
        "pre-tokenised",
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1], "length": 2},
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    ),
}
for first, second in (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")):
    CASES[f"pair {first}"] = (
        f"text pair classification ({first}, {second})",
        {first: "A.", second: "B.", "label": "entailment"},
        {"text": "A.", "text_pair": "B.", "label": "entailment"},
    )


@pytest.mark.parametrize(("layout", "row", "example"), CASES.values(), ids=CASES)
def test_a_layout_is_recognised_and_read(layout: str, row: Row, example: Row) -> None:
    found = recognise([row])
    assert (found.name, found.convert(row)) == (layout, example)


def test_every_layout_has_a_case() -> None:
    plain = {layout.name for layout in LAYOUTS if not layout.name.startswith("text pair")}
    assert plain <= {layout for layout, _, _ in CASES.values()}


def test_scores_are_told_from_classes_by_all_labels_together() -> None:
    rows = [{"text": "a", "label": 3}, {"text": "b", "label": 4.5}]
    found = recognise(rows)
    assert (found.kind, found.convert(rows[0])["label"]) == ("regression", 3.0)
    assert recognise(rows[:1]).kind == "classification"


def test_columns_of_few_rows_do_not_mislead() -> None:
    rows: list[Row] = [{"text": str(i)} for i in range(9)] + [{"messages": TALK, "label": "x"}]
    found = recognise(rows)
    assert found.name == "plain text"
    with pytest.raises(RowError, match="text is missing"):
        found.convert(rows[-1])


def test_what_is_used_and_what_is_not_is_said_in_one_line() -> None:
    found = recognise([{"id": 1, "instruction": "A?", "topic": "x", "output": "B."}])
    assert found.describe() == "alpaca: columns id, instruction, output used; topic ignored"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instrution": "A?", "output": "B."},
            r"columns 'instrution', 'output' fit no known layout; nearest is alpaca, which misses 'instruction'\. "
            r"Rename with columns=\{'instrution': 'instruction'\}",
        ),
        ({"Instruction": "A?", "output": "B."}, r"columns=\{'Instruction': 'instruction'\}"),
        ({"prompt": "A?"}, r"nearest is prompt-completion, which misses 'completion'"),
        ({"text": ["a"]}, r'nearest is plain text, a row of which is \{"text": "..."\}; found text list'),
        ({"messages": "Hi"}, r"nearest is messages, .* found messages str"),
        (
            {"a": 1, "b": 2},
            r"columns 'a', 'b' fit no known layout; there are input_ids \(tokenised\); .* text \(text\)",
        ),
        ({}, r"columns \(none\) fit no known layout"),
    ],
)
def test_an_unknown_layout_names_the_nearest_and_what_it_misses(row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recognise([row])


def test_a_layout_or_a_kind_can_be_asked_for() -> None:
    row = {"messages": TALK, "label": "greeting"}
    assert recognise([row], kind="chat").name == "messages"
    assert recognise([row], format="messages").kind == "chat"
    with pytest.raises(DataError, match="unknown format 'mesages'; did you mean 'messages'"):
        recognise([row], format="mesages")
    with pytest.raises(DataError, match="unknown kind of data 'chats'; did you mean 'chat'"):
        recognise([row], kind="chats")
    with pytest.raises(DataError, match=r"columns 'messages', 'label' fit no known layout; there are tokens \+ tags"):
        recognise([row], kind="tagging")


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        ({"instruction": "A?", "output": "B."}, {"instruction": "A?"}, "output is missing"),
        (
            {"instruction": "A?", "output": "B."},
            {"instruction": ["A?"], "output": "B."},
            "a turn is not an object: found str",
        ),
        ({"query": "A?", "response": "B."}, {"query": "A?", "response": "B.", "history": [["C"]]}, "history is not"),
        ({"messages": TALK}, {"messages": [user("Hi")]}, "no assistant turn: roles: user"),
        ({"messages": TALK}, {"messages": []}, "no assistant turn: roles: none"),
        ({"messages": TALK}, {"messages": "[{"}, "messages is not JSON"),
        ({"messages": TALK, "tools": []}, {"messages": TALK, "tools": "{no"}, "tools is not JSON"),
        ({"text": "a", "label": "x"}, {"text": "a", "label": None}, "label is missing"),
        ({"tokens": ["a"], "tags": [0]}, {"tokens": ["a"], "tags": [0, 1]}, "differ in number: 1 tokens, 2 tags"),
        ({"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": [1, 2]}, "labels has 2, input_ids 1"),
        ({"input_ids": [1]}, {"input_ids": ["a"]}, "input_ids is not a list of whole numbers"),
        (
            {"prompt": "A?", "chosen": "B", "rejected": "C"},
            {"prompt": "A?", "chosen": "B", "rejected": "B"},
            "not differ",
        ),
        ({"chosen": TALK, "rejected": [user("Hi")]}, {"chosen": TALK, "rejected": [user("No")]}, "different prompts"),
        (
            {"messages": TALK, "label": True},
            {"messages": [user("Hi")], "label": True},
            "not the assistant's",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_why(good: Row, bad: Row, why: str) -> None:
    found = recognise([good, good, good, bad])
    with pytest.raises(RowError, match=why):
        found.convert(bad)


JUNK: list[Any] = [
    None,
    "",
    -1,
    1.5,
    float("nan"),
    True,
    [],
    {},
    [None],
    [[]],
    ["a"],
    [{"role": "user"}],
    "[{",
    "\ud800",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def planted(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return copy.deepcopy(junk)
    changed = copy.copy(value)
    changed[path[0]] = planted(value[path[0]], path[1:], junk)
    return changed


@pytest.mark.parametrize(("layout", "row", "example"), CASES.values(), ids=CASES)
def test_junk_anywhere_in_a_row_is_read_or_refused(layout: str, row: Row, example: Row) -> None:
    found = recognise([row])
    for path in places(row):
        for junk in JUNK:
            try:
                read = found.convert(planted(row, path, junk))
            except RowError as refused:
                assert refused.reason  # noqa: PT017
            else:
                assert set(read) <= {*example, "tools", "label"}
