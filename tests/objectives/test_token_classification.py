from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from pegbox import objectives
from pegbox.core.errors import DataError

from .conftest import V, padded

tag = objectives.get("token_classification")


@pytest.fixture
def tagger() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    return BertForTokenClassification(config).eval()


@pytest.fixture
def batch(examples: list[Tensor]) -> dict[str, Tensor]:
    whole = padded(examples)
    return {**whole, "labels": torch.where(whole["labels"] == -100, -100, whole["labels"] % 3)}


def test_equals_the_models_own_loss(tagger: nn.Module, batch: dict[str, Tensor]) -> None:
    torch.testing.assert_close(tag(tagger, batch)["ce"], tagger(**batch).loss)


def test_options_are_torchs(tagger: nn.Module, batch: dict[str, Tensor]) -> None:
    weights = torch.tensor([1.0, 2.0, 0.5])
    got = tag(tagger, batch, label_smoothing=0.2, class_weights=weights)["ce"]
    z = tagger(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    torch.testing.assert_close(got, F.cross_entropy(z, batch["labels"].flatten(), weights, label_smoothing=0.2))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_accumulated_micro_batches_equal_the_whole(
    tagger: nn.Module, batch: dict[str, Tensor], weights: list[float] | None
) -> None:
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    items = sum(tag.count(part, class_weights=weights) for part in parts)
    got = sum(tag(tagger, part, class_weights=weights, num_items=items)["ce"] for part in parts)
    torch.testing.assert_close(got, tag(tagger, batch, class_weights=weights)["ce"])


def test_no_label_is_zero(tagger: nn.Module, batch: dict[str, Tensor]) -> None:
    batch["labels"].fill_(-100)
    loss = tag(tagger, batch)["ce"]
    loss.backward()
    assert loss.item() == 0.0


def test_predictions_measure_labelled_tokens(tagger: nn.Module, batch: dict[str, Tensor]) -> None:
    predictions = tag.predict(tagger, batch)
    assert len(predictions["labels"]) == int((batch["labels"] != -100).sum())
    measured = tag.measure(predictions)
    assert measured["nll"] == pytest.approx(tag(tagger, batch)["ce"].item(), rel=1e-5)
    right = predictions["predictions"] == predictions["labels"]
    assert measured["accuracy"] == pytest.approx(right.float().mean().item())


def test_labels_of_another_length_are_an_error(tagger: nn.Module, batch: dict[str, Tensor]) -> None:
    batch["labels"] = torch.zeros(4, 30).long()
    with pytest.raises(DataError, match="expected one a token"):
        tag(tagger, batch)
