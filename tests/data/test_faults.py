from __future__ import annotations

from typing import Any

import pytest

from pegbox.data.faults import badly_encoded, empty_prompt, empty_target, roles_out_of_order

ROLES = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}


def turns(letters: str) -> list[dict[str, Any]]:
    """`c` is an assistant turn that calls a tool."""
    return [
        {"role": ROLES[letter], "content": letter} | ({"tool_calls": [{}]} if letter == "c" else {})
        for letter in letters
    ]


@pytest.mark.parametrize("order", ["ua", "sua", "uaua", "sucta", "uctta", "ucta", "uctcta"])
def test_roles_in_order(order: str) -> None:
    assert not roles_out_of_order({"messages": turns(order)})


@pytest.mark.parametrize("order", ["au", "a", "usa", "uua", "uaa", "uau", "uata", "ssua", "uat", "tua", "uctua"])
def test_roles_out_of_order(order: str) -> None:
    assert roles_out_of_order({"messages": turns(order)})


def test_roles_of_preferences_and_of_conversations_to_classify() -> None:
    assert not roles_out_of_order({"prompt": turns("su"), "chosen": turns("a"), "rejected": turns("ctaua")})
    assert roles_out_of_order({"prompt": turns("ua"), "chosen": turns("a"), "rejected": turns("a")})
    assert not roles_out_of_order({"prompt": [], "chosen": turns("a"), "rejected": turns("a")})
    assert not roles_out_of_order({"messages": turns("uau"), "label": "angry"})


@pytest.mark.parametrize(
    "text",
    [
        "dÃ©jÃ\xa0 vu",
        "itâ€™s",
        "Â£5",
        "ÐŸÑ€Ð¸Ð²ÐµÑ‚",
        "ä½\xa0å¥½",
        "ðŸ˜€",
        "\ufeffstart",
        "caf\ufffd",
        "naÃ¯ve",
        "Ã\x89toile",
    ],
)
def test_text_read_in_another_encoding(text: str) -> None:
    assert badly_encoded({"text": text})


@pytest.mark.parametrize(
    "text",
    [
        "déjà vu",
        "it’s",
        "« café » et « CAFÉ »",
        "5 £",
        "Привет",
        "你好",
        "😀",
        "IRMÃ» e IRMÃ”",
        "Ångström",
        "straße…",
        "Ḥā’il",
    ],
)
def test_text_in_its_own_encoding(text: str) -> None:
    assert not badly_encoded({"text": text})
    assert badly_encoded({"text": text.encode().decode("latin-1")}) == (not text.isascii())


def test_empty_targets_and_prompts() -> None:
    blank = {"role": "assistant", "content": " \n"}
    assert empty_target({"messages": [*turns("u"), blank]})
    assert not empty_target({"messages": [*turns("u"), blank | {"train": False}, *turns("ua")]})
    assert not empty_target({"messages": [*turns("u"), blank | {"tool_calls": [{}]}]})
    assert empty_target({"prompt": turns("u"), "chosen": turns("a"), "rejected": [blank]})
    assert empty_target({"text": " "})
    assert empty_prompt({"messages": [{"role": "user", "content": ""}, *turns("a")]})
    assert empty_prompt({"text": "a", "text_pair": "", "label": 1})
    assert not empty_prompt({"text": "a", "label": 1})
