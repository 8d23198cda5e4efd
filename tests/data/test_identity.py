from __future__ import annotations

from pegbox.data.identity import Ids, content_id, fingerprint, question, surface

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
PAIR = {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": []}


def test_an_id_follows_from_the_content_alone() -> None:
    assert content_id({"text": "a", "label": 1}) == content_id({"label": 1, "text": "a", "id": "x"})
    assert content_id({"text": "a"}) != content_id({"text": "b"})
    assert content_id({"text": "half \ud83d"}) != content_id({"text": "half \ud83c"})
    assert len(content_id(CHAT)) == 16


def test_ids_are_handed_out_once() -> None:
    ids = Ids()
    assert [ids.unique(wanted) for wanted in ("a", "a", "b", "a", "a-2", "a-4", "a")] == [
        "a",
        "a-2",
        "b",
        "a-3",
        "a-2-2",
        "a-4",
        "a-5",
    ]


def test_surface_and_question() -> None:
    assert surface({"text": "a", "text_pair": "b", "label": 1}) == "a\nb"
    assert surface({"tokens": ["a", "b"], "tags": [0, 1]}) == "a b"
    assert surface({"input_ids": [1, 2]}) == "1 2"
    assert surface(CHAT) == surface(PAIR) == "user: Hi\nassistant: Ho"
    assert question(CHAT) == question(PAIR) == "user: Hi"
    assert question(CHAT | {"label": 1}) == surface(CHAT)


def test_fingerprints_pass_over_case_and_spacing() -> None:
    assert fingerprint("A  b\n") == fingerprint("a B") == fingerprint("\uff21 b")
    assert fingerprint("a b") != fingerprint("ab")
