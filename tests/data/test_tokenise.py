"""Rows as tokens and labels: nothing is lost silently, and nothing is trained that should not be."""

from __future__ import annotations

import time
from array import array

import pytest
from chat_families import FAMILIES
from small_tokenizers import SENTENCES, small, word_piece

from pegbox.core.errors import DataError, SettingsError
from pegbox.data.templates import prove
from pegbox.data.tokenise import (
    Encoded,
    Rejected,
    encode,
    encode_all,
    encode_classification,
    encode_classification_all,
    encode_each,
    encode_preference_all,
    encode_tokens,
)


def chat(*contents, id="a"):
    roles = ("user", "assistant")
    return {"id": id, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def tokenizer(family="qwen", kind="byte-level"):
    return small(kind, FAMILIES[family])


def trained(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded.labels if label != -100])


# -- chat ----------------------------------------------------------------------------------------------------------


def test_all_is_one_and_keeps_the_order():
    rows = [
        chat("Hi", "Yo!", id="chat"),
        {"id": "text", "text": "Hello there"},
        chat("Hi", id="silent"),
        {"id": "ids", "input_ids": [5, 6, 7]},
        chat("Hi", "Yo!", "And?", "So.", id="more"),
    ]
    used, rejected = encode_all(rows, tokenizer(), max_length=99)
    assert [row.id for row in used] == ["chat", "text", "ids", "more"]
    assert [row.id for row in rejected] == ["silent"]
    assert [encode(row, tokenizer(), max_length=99) for row in rows] == [*used[:2], rejected[0], *used[2:]]
    assert list(encode_each(iter(rows), tokenizer(), max_length=99)) == [*used[:2], rejected[0], *used[2:]]


def test_training_on_everything():
    tok = tokenizer()
    row = chat("Hi", "Yo!", "And?", "So.")
    encoded = encode(row, tok, max_length=99, assistant_only=False)
    assert encoded.labels == encoded.input_ids
    row["messages"][1]["train"] = False
    less = encode(row, tok, max_length=99, assistant_only=False)
    assert "Yo!" not in trained(less, tok)
    assert "And?" in trained(less, tok)


def test_prompt_and_completion_train_the_completion():
    tok = tokenizer()
    messages = chat("Hi", "Yo!", "And?", "So.")["messages"]
    encoded = encode({"id": "a", "prompt": messages[:3], "completion": messages[3:]}, tok, max_length=99)
    assert trained(encoded, tok) == "So.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat("Hi", ""), "empty target"),
        (chat("Hi", " \n"), "empty target"),
        (chat("Hi"), "no trained turn"),
        ({"id": "a", "messages": [{"role": "assistant", "content": "Yo!", "train": False}]}, "no trained turn"),
        ({"id": "a", "text": ""}, "empty text"),
        ({"id": "a", "input_ids": [1, 2], "labels": [1]}, "input_ids, labels and attention_mask differ in length"),
        ({"id": "a", "input_ids": [1, 2], "labels": [1, -100]}, "empty target"),
        ({"id": "a", "input_ids": [], "labels": []}, "empty target"),
        ({"id": "a", "input_ids": [1.5, 2]}, "input_ids or labels are not token ids"),
    ],
)
def test_a_row_without_a_target_is_rejected_with_its_reason(row, reason):
    found = encode(row, tokenizer(), max_length=99)
    assert isinstance(found, Rejected)
    assert (found.id, found.reason) == ("a", reason)


def test_what_the_template_refuses_is_rejected_with_its_words():
    found = encode(chat("Hi", "Yo!", "And?"), tokenizer("gemma"), max_length=99)
    assert isinstance(found, Encoded)
    found = encode({"id": "a", "messages": chat("x", "y")["messages"][::-1]}, tokenizer("gemma"), max_length=99)
    assert found == Rejected("a", "template refuses", "roles must alternate")


def test_the_template_and_its_proof_can_be_given():
    tok = small()
    by_name = encode(chat("Hi", "Yo!"), tok, max_length=99, template="plain")
    assert trained(by_name, tok).strip() == "Yo!</s>"
    assert encode(chat("Hi", "Yo!"), tok, max_length=99, proof=prove(tok, "plain")) == by_name
    with pytest.raises(DataError, match="no chat template"):
        encode(chat("Hi", "Yo!"), tok, max_length=99)


def test_a_row_of_no_known_form_is_an_error_that_names_the_forms():
    with pytest.raises(DataError, match=r"'chosen', 'rejected'; expected messages.*encode_preference"):
        encode({"id": "a", "chosen": [], "rejected": []}, tokenizer(), max_length=99)


def test_a_slow_tokenizer_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="does not say what characters"):
        encode({"id": "a", "text": "x"}, ByT5Tokenizer(), max_length=99)


# -- text and given ids --------------------------------------------------------------------------------------------


def test_text_is_trained_whole_and_ends_with_one_eos():
    tok = tokenizer("llama2", "metaspace")  # one that puts a start token before a text
    plain = encode({"id": "a", "text": "Hello there"}, tok, max_length=99)
    assert plain.labels == plain.input_ids
    assert plain.end_trained
    ids = list(plain.input_ids)
    assert (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id)
    assert ids.count(tok.bos_token_id) == ids.count(tok.eos_token_id) == 1
    for text in ("<s>Hello there", "Hello there</s>", "<s>Hello there</s>"):
        assert encode({"id": "a", "text": text}, tok, max_length=99) == plain


def test_given_ids_are_taken_as_they_are_less_padding():
    row = {"id": "a", "input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]}
    encoded = encode(row, tokenizer(), max_length=99)
    assert encoded == Encoded(array("i", [5, 6, 7]), array("i", [-100, 6, 7]), "a", False, True)
    assert list(encode({"id": "a", "input_ids": [5, 6, 7]}, tokenizer(), max_length=99).labels) == [5, 6, 7]


# -- truncation ----------------------------------------------------------------------------------------------------


def test_cutting_the_end():
    tok = tokenizer()
    whole = encode(chat("Hi", "Hello there! " * 9), tok, max_length=999)
    cut = encode(chat("Hi", "Hello there! " * 9), tok, max_length=len(whole) - 3)
    assert cut.input_ids == whole.input_ids[:-3]
    assert (cut.truncated, cut.end_trained) == (True, False)
    assert (whole.truncated, whole.end_trained) == (False, True)


def test_the_newline_after_the_end_token_may_be_cut():
    tok = tokenizer()
    whole = encode(chat("Hi", "Yo!"), tok, max_length=999)
    cut = encode(chat("Hi", "Yo!"), tok, max_length=len(whole) - 1)
    assert (cut.truncated, cut.end_trained) == (True, True)


def test_cutting_the_beginning_keeps_the_start_token_and_the_target():
    tok = tokenizer("llama3")
    whole = encode(chat("Hello there! " * 9, "Yo!"), tok, max_length=999)
    cut = encode(chat("Hello there! " * 9, "Yo!"), tok, max_length=20, truncation="left")
    assert list(cut.input_ids) == [tok.bos_token_id, *whole.input_ids[-19:]]
    assert (cut.truncated, cut.end_trained) == (True, True)
    assert trained(cut, tok) == "Yo!<|eot_id|>"


def test_a_target_that_is_cut_away_and_a_row_too_long_are_rejected():
    row = chat("Hello there! " * 9, "Yo!")
    assert encode(row, tokenizer(), max_length=20).reason == "target cut away"
    dropped = encode(row, tokenizer(), max_length=20, truncation="drop")
    assert dropped.reason == "too long"
    assert dropped.detail.endswith("tokens of at most 20")


def test_wrong_limits():
    with pytest.raises(SettingsError, match="unknown truncation 'rihgt'; did you mean 'right'"):
        encode(chat("Hi", "Yo!"), tokenizer(), max_length=20, truncation="rihgt")
    with pytest.raises(SettingsError, match="max_length is 1"):
        encode(chat("Hi", "Yo!"), tokenizer(), max_length=1)


# -- preferences ---------------------------------------------------------------------------------------------------


def preference(prompt, chosen, rejected):
    user = {"role": "user", "content": prompt}
    return {
        "id": "a",
        "prompt": [user],
        **{k: [{"role": "assistant", "content": v}] for k, v in (("chosen", chosen), ("rejected", rejected))},
    }


def encoded_pair(row, tok, **settings):
    used, rejected = encode_preference_all([row], tok, **settings)
    return (used or rejected)[0]


def test_a_preference_trains_both_answers_after_the_same_prompt():
    tok = tokenizer()
    pair = encoded_pair(preference("Hi", "Yo!", "No."), tok, max_length=99)
    assert trained(pair.chosen, tok) == "Yo!<|im_end|>"
    assert trained(pair.rejected, tok) == "No.<|im_end|>"
    first = next(i for i, label in enumerate(pair.chosen.labels) if label != -100)
    assert pair.chosen.input_ids[:first] == pair.rejected.input_ids[:first]


def test_earlier_answers_in_the_prompt_are_not_trained():
    tok = tokenizer()
    row = preference("Hi", "Yo!", "No.")
    row["prompt"] = [*row["prompt"], {"role": "assistant", "content": "Hm."}, *row["prompt"]]
    assert trained(encoded_pair(row, tok, max_length=99).chosen, tok) == "Yo!<|im_end|>"


def test_cutting_a_preference_from_the_left_leaves_the_same_prompt():
    tok = tokenizer()
    pair = encoded_pair(preference("Hello there! " * 9, "Yo!", "No. " * 9), tok, max_length=60, truncation="left")
    first = [next(i for i, label in enumerate(s.labels) if label != -100) for s in (pair.chosen, pair.rejected)]
    assert len(pair.rejected) == 60
    assert first[0] == first[1]
    assert pair.chosen.input_ids[: first[0]] == pair.rejected.input_ids[: first[0]]
    assert trained(pair.chosen, tok) == "Yo!<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (preference("Hi", "Yo!", "Yo!"), "chosen and rejected are the same", ""),
        (preference("Hi", "Yo!", ""), "empty target", "rejected: the assistant says nothing"),
    ],
)
def test_a_preference_that_prefers_nothing_is_rejected(row, reason, detail):
    assert encoded_pair(row, tokenizer(), max_length=99) == Rejected("a", reason, detail)


# -- classification, regression, tagging ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "names", "number"),
    [
        ("yes", ["no", "yes"], 1),
        (1, ["no", "yes"], 1),
        (7, ["5", "7"], 1),
        (["b", "c"], ["a", "b", "c"], (0.0, 1.0, 1.0)),
        ([], ["a", "b"], (0.0, 0.0)),
        ("0.5", None, 0.5),
        (2, None, 2.0),
    ],
)
def test_labels(label, names, number):
    row = encode_classification({"id": "a", "text": "hello", "label": label}, word_piece(), names, max_length=16)
    assert (row.label, type(row.label)) == (number, type(number))


@pytest.mark.parametrize(
    ("row", "names", "reason", "detail"),
    [
        ({"text": "x", "label": "yse"}, ["no", "yes"], "unknown label", "'yse'; did you mean 'yes'?"),
        ({"text": "x", "label": 2}, ["no", "yes"], "unknown label", "2; one of: no, yes"),
        ({"text": "x", "label": None}, ["no", "yes"], "label is missing", ""),
        ({"text": "x", "label": "much"}, None, "label is not a number", "found 'much'"),
        ({"text": " ", "label": "no"}, ["no", "yes"], "empty text", ""),
    ],
)
def test_a_wrong_label_is_rejected(row, names, reason, detail):
    found = encode_classification({"id": "a", **row}, word_piece(), names, max_length=16)
    assert found == Rejected("a", reason, detail)


def test_a_pair_of_texts():
    tok = word_piece()
    row = {"id": "a", "text": "what is it ?", "text_pair": "a pegbox . " * 9, "label": 0}
    encoded = encode_classification(row, tok, ["no", "yes"], max_length=16)
    assert tok.decode(encoded.input_ids).startswith("[CLS] what is it? [SEP] a peg")
    assert (len(encoded), encoded.truncated) == (16, True)
    assert list(encoded.token_type_ids) == [0] * 6 + [1] * 10


def test_classifying_conversations():
    row = {"id": "a", "messages": chat("Hi", "Yo!")["messages"], "label": 1}
    tok = word_piece()
    assert tok.decode(encode_classification(row, tok, ["no", "yes"], max_length=16).input_ids) == "[CLS] hi yo! [SEP]"
    tok = tokenizer("llama2", "metaspace")
    encoded = encode_classification(row, tok, ["no", "yes"], max_length=99)
    assert encoded.token_type_ids is None
    assert list(encoded.input_ids) == tok.apply_chat_template(row["messages"], return_dict=True)["input_ids"]


def test_many_rows_with_some_rejected_keep_their_own_labels():
    rows = [{"id": str(i), "text": f"word {i}", "label": i % 3} for i in range(9)]
    used, rejected = encode_classification_all(rows, word_piece(), ["a", "b"], max_length=16)
    assert [(row.id, row.label) for row in used] == [(str(i), i % 3) for i in range(9) if i % 3 < 2]
    assert [row.id for row in rejected] == ["2", "5", "8"]
    assert word_piece().decode(used[-1].input_ids) == "[CLS] word 7 [SEP]"


def test_tags_stand_at_the_first_token_of_each_word():
    tok = word_piece()
    row = {"id": "a", "tokens": ["Stradivari", "lived", "in", "Cremona"], "tags": ["PER", "O", "O", 1]}
    encoded = encode_tokens(row, tok, ["O", "LOC", "PER"], max_length=32)
    pieces = tok.convert_ids_to_tokens(encoded.input_ids)
    assert {piece: label for piece, label in zip(pieces, encoded.labels, strict=True) if label != -100} == {
        "st": 2,
        "lived": 0,
        "in": 0,
        "cr": 1,
    }


@pytest.mark.parametrize(
    ("tokens", "tags", "reason"),
    [
        (["a", "b"], ["O"], "tokens and tags differ in number"),
        ([], [], "empty text"),
        (["a"], ["X"], "unknown tag"),
    ],
)
def test_tags_that_do_not_fit_are_rejected(tokens, tags, reason):
    found = encode_tokens({"id": "a", "tokens": tokens, "tags": tags}, word_piece(), ["O"], max_length=16)
    assert found.reason == reason


def test_tagged_words_beyond_the_limit_are_cut_and_said_so():
    row = {"id": "a", "tokens": ["one"] * 9, "tags": ["O"] * 9}
    encoded = encode_tokens(row, word_piece(), ["O"], max_length=6)
    assert (len(encoded), encoded.truncated) == (6, True)
    assert encode_tokens(row, word_piece(), ["O"], max_length=2).reason == "target cut away"


# -- speed ---------------------------------------------------------------------------------------------------------


def test_masking_costs_no_more_than_a_few_times_the_tokenising():
    tok = tokenizer()
    chats = [chat(" ".join(SENTENCES) * 2, " ".join(SENTENCES) * (1 + i % 9), id=str(i)) for i in range(300)]
    texts = [row["messages"][0]["content"] + row["messages"][1]["content"] for row in chats]
    start = time.perf_counter()
    tok(texts)
    plain = time.perf_counter() - start
    used, rejected = encode_all(chats, tok, max_length=4096)
    assert (len(used), len(rejected)) == (300, 0)
    assert time.perf_counter() - start - plain < 10 * plain
