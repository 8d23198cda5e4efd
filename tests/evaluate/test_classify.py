from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pegbox.core.errors import DataError, ModelError
from pegbox.evaluate.classify import Span, _grouped, _span, _Word, classify, spans

from . import tiny

TEXTS = ["Hello there", "x", "A longer text, of several words"]


def test_texts_get_names_and_probabilities(bases: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bases / "bert")
    tuned = tiny.tuned(model, rank=4, by=0.05, also_train=("classifier",))
    tuned.save(tmp_path / "adapter")
    answers = classify(tmp_path / "adapter", TEXTS)
    tokenizer = tiny.tokenizer(chat=False)
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            shares = tuned(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        names = ["bad", "fair", "good"]
        assert answer.label == names[int(shares.argmax())]
        assert answer.scores == pytest.approx(dict(zip(names, shares.tolist(), strict=True)), abs=1e-6)
        assert answer.score == max(answer.scores.values())


def test_pairs_regressions_and_classes_that_are_not_exclusive() -> None:
    tokenizer = tiny.tokenizer()
    pairs = classify(tiny.bert(), [("a", "b"), ("a", "c")], tokenizer=tokenizer)
    assert pairs[0] != pairs[1]
    value = classify(tiny.bert(labels=("score",)), TEXTS, tokenizer=tokenizer)[0]
    assert value.label is None
    assert value.scores == {}
    several = tiny.bert()
    several.config.problem_type = "multi_label_classification"
    several.classifier.bias.data = torch.tensor([5.0, -5.0, 5.0])
    answer = classify(several, TEXTS, tokenizer=tokenizer)[0]
    assert answer.labels == ("bad", "good")
    assert sum(answer.scores.values()) > 1.5
    with pytest.raises(DataError, match="texts and pairs of texts are mixed: 1 of 2"):
        classify(several, ["a", ("b", "c")], tokenizer=tokenizer)


def test_a_model_without_a_padding_id_reads_one_text_at_a_time() -> None:
    config = tiny.llama().config
    config.pad_token_id, config.num_labels = None, 3
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    assert len(classify(model, TEXTS, tokenizer=tiny.tokenizer())) == 3


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(ModelError, match="a LlamaForCausalLM answers each token, not the whole"):
        classify(tiny.llama(), TEXTS, tokenizer=tiny.tokenizer())
    with pytest.raises(ModelError, match="a BertForSequenceClassification gives one answer a text; it finds no spans"):
        spans(tiny.bert(), TEXTS, tokenizer=tiny.tokenizer())


def test_spans_are_words_of_one_label_with_their_place() -> None:
    model = tiny.tagger()
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])  # I-PER, everywhere
    (found,) = spans(model, ["Ana met Bob"], tokenizer=tiny.tokenizer())
    assert [(s.label, s.start, s.end, s.text) for s in found] == [("PER", 0, 11, "Ana met Bob")]
    assert found[0].score == pytest.approx(1, abs=1e-3)


def test_tags_are_grouped_by_their_prefixes() -> None:
    text = "a b c d e f"
    tags = ["B-PER", "I-PER", "B-PER", "O", "I-LOC", "MISC"]
    words = [_Word(tag, 0.5, max(2 * k - 1, 0), 2 * k + 1) for k, tag in enumerate(tags)]
    found = [_span(text, group) for group in _grouped(words)]
    assert found == [
        Span("PER", 0, 3, "a b", 0.5),
        Span("PER", 4, 5, "c", 0.5),
        Span("LOC", 8, 9, "e", 0.5),
        Span("MISC", 10, 11, "f", 0.5),
    ]
