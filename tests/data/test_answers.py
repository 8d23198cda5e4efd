"""Pairs, unpaired answers and targets: as tokens, packed, and as batches."""

from __future__ import annotations

import pytest
from chat_families import FAMILIES
from small_tokenizers import small, word_piece

from pegbox.core.errors import DataError
from pegbox.data.collate import AnswerCollator, PackedPairCollator, PairCollator, TargetCollator
from pegbox.data.encoded import Encoded, EncodedAnswer, EncodedPair, EncodedTarget, Rejected
from pegbox.data.examples import read
from pegbox.data.packing import pack_pairs
from pegbox.data.tokenise import encode_preference_all, encode_unpaired_all
from pegbox.data.tokenise_targets import encode_targets_all


def row(length: int, first: int, prompt: int = 1) -> Encoded:
    ids = list(range(first, first + length))
    return Encoded(ids, [-100] * prompt + ids[prompt:], str(first))


def pair(a: int, b: int, first: int, **more) -> EncodedPair:
    return EncodedPair(row(a, first), row(b, first + 50), str(first), **more)


def tokenizer():
    return small("byte-level", FAMILIES["qwen"])


def trained(encoded, tok):
    return tok.decode([label for label in encoded.labels if label != -100])


# -- unpaired ----------------------------------------------------------------------------------------------------------


def answers(count: int = 4):
    rows = [{"prompt": f"say {i}", "completion": f"word {i}", "label": bool(i % 2)} for i in range(count)]
    return list(read(rows))


def test_unpaired_rows_get_an_answer_of_another_prompt():
    tok = tokenizer()
    used, lost = encode_unpaired_all(answers(), tok, max_length=99)
    assert not lost
    assert [one.desirable for one in used] == [False, True, False, True]
    assert [trained(one.answer, tok) for one in used] == [f"word {i}<|im_end|>" for i in range(4)]
    assert [trained(one.mismatched, tok) for one in used] == [f"word {i}<|im_end|>" for i in (2, 3, 0, 1)]
    for one in used:
        first = next(i for i, label in enumerate(one.answer.labels) if label != -100)
        assert one.answer.input_ids[:first] == one.mismatched.input_ids[:first]


def test_a_row_whose_answers_do_not_fit_is_rejected():
    rows = answers()
    rows[0]["prompt"][0]["content"] = "say " * 99
    used, lost = encode_unpaired_all(rows, tokenizer(), max_length=60)
    assert [one.id for one in used] == [r["id"] for r in rows[1:]]
    assert lost == [Rejected(rows[0]["id"], "target cut away", lost[0].detail)]


def test_one_unpaired_row_has_no_other():
    with pytest.raises(DataError, match="must be at least two"):
        encode_unpaired_all(answers(1), tokenizer(), max_length=99)


def test_batches_of_answers():
    rows = [EncodedAnswer(row(4, 1), row(3, 11), True, "a"), EncodedAnswer(row(2, 21), row(5, 31), False, "b")]
    batch = AnswerCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [21, 22, 0, 0]]
    assert batch["mismatched_input_ids"].tolist() == [[11, 12, 13, 0, 0], [31, 32, 33, 34, 35]]
    assert batch["mismatched_attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["desirable"].tolist() == [1, 0]
    assert "reference_log_probs" not in batch
    known = [EncodedAnswer(r.answer, r.mismatched, r.desirable, r.id, (-i, -i - 0.5)) for i, r in enumerate(rows)]
    batch = AnswerCollator(0)(known)
    assert batch["reference_log_probs"].tolist() == [0.0, -1.0]
    assert batch["mismatched_reference_log_probs"].tolist() == [-0.5, -1.5]


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_margins_come_from_the_data():
    rows = read(
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1.5"},
            {"prompt": "a", "chosen": "b", "rejected": "d"},
        ]
    )
    used, _ = encode_preference_all(rows, tokenizer(), max_length=99)
    assert [one.margin for one in used] == [1.5, None]
    assert PairCollator(0)(used)["margin"].tolist() == [1.5, 0.0]


def test_a_margin_that_is_no_number_is_rejected():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
        {"prompt": "a", "chosen": "b", "rejected": "d"},
    ]
    found = read(rows)
    assert found.rejected.reasons == {"margin is not a number": 1}


def test_known_references_follow_the_answers():
    rows = [pair(3, 4, 1, reference=(-1.0, -2.0)), pair(3, 2, 11, reference=(-3.0, -4.0))]
    assert PairCollator(0)(rows)["reference_log_probs"].tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert "reference_log_probs" not in PairCollator(0)([rows[0], pair(3, 2, 11)])


def test_packed_pairs():
    rows = [pair(3, 2, 1), pair(4, 4, 11), pair(2, 2, 21)]
    packing = pack_pairs(rows, 9, seed=0)
    assert sorted(one for line in packing.rows for one in line.ids) == ["1", "11", "21"]
    assert all(len(line) <= 9 for line in packing.rows)
    assert packing.tokens == 17
    batch = PackedPairCollator(0)(packing.rows)
    numbered = {one.id: n for n, one in enumerate(p for line in packing.rows for p in line.pairs)}
    for one in rows:
        for side, answer in enumerate((one.chosen, one.rejected)):
            here = batch["segments"] == side * 3 + numbered[one.id]
            assert batch["input_ids"][here].tolist() == list(answer.input_ids)
            assert batch["position_ids"][here].tolist() == list(range(len(answer)))
            assert batch["labels"][here].tolist() == [-100, *answer.labels[1:]]
    padding = batch["segments"] == -1
    assert batch["labels"][padding].eq(-100).all()
    assert batch["position_ids"][padding].tolist()[:1] == [0]


def test_a_pair_longer_than_a_row():
    with pytest.raises(
        DataError, match=r"pair '1' has 9 tokens in its two answers, .* encode with max_length=4 or less"
    ):
        pack_pairs([pair(5, 4, 1)], 8)


# -- targets -----------------------------------------------------------------------------------------------------------


def chats(*contents: tuple[str, str]):
    return list(read([{"prompt": a, "completion": b} for a, b in contents]))


def test_sources_and_targets():
    tok = word_piece()
    (one,), lost = encode_targets_all(chats(("what is it ?", "a pegbox")), tok, max_length=16)
    assert not lost
    assert tok.decode(one.input_ids) == "[CLS] what is it? [SEP]"
    assert tok.decode(one.labels).startswith("[CLS] a pegbox [SEP]")


@pytest.mark.parametrize(("truncation", "kept"), [("right", "what is"), ("left", "it?")])
def test_a_long_source_loses_one_end_and_keeps_its_frame(truncation, kept):
    tok = word_piece()
    (one,), _ = encode_targets_all(chats(("what is it ?", "a")), tok, max_length=4, truncation=truncation)
    assert tok.decode(one.input_ids) == f"[CLS] {kept} [SEP]"
    assert one.truncated
    used, lost = encode_targets_all(chats(("what is it ?", "a")), tok, max_length=4, truncation="drop")
    assert not used
    assert lost[0].reason == "too long"


def test_the_end_of_a_long_target_stays():
    tok = word_piece()
    (one,), _ = encode_targets_all(chats(("a", "what is it ? " * 9)), tok, max_length=6)
    whole, _ = encode_targets_all(chats(("a", "what is it ? " * 9)), tok, max_length=99)
    assert len(one.labels) == 6
    assert one.labels[-1] == whole[0].labels[-1]


def test_rows_without_an_answer_are_rejected():
    rows = [{"id": "a", "messages": [{"role": "user", "content": "hi"}]}, *chats(("a", "b"))]
    rows.append({"id": "c", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]})
    used, lost = encode_targets_all(rows, word_piece(), max_length=16)
    assert len(used) == 1
    assert [(one.id, one.reason) for one in lost] == [
        ("a", "the last turn is not the assistant's"),
        ("c", "empty target"),
    ]


def test_batches_of_targets():
    rows = [EncodedTarget([1, 2, 3], [4], "a"), EncodedTarget([5], [6, 7], "b")]
    batch = TargetCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[4, -100], [6, 7]]
