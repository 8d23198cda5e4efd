from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from pegbox import objectives
from pegbox.core.errors import DataError, SettingsError

from .conftest import LLAMA, V, padded

CLASSES = 3


@pytest.fixture(params=["bert", "llama"])
def classifier(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=CLASSES)).eval()
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config).eval()


def rows(examples: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
    batch = padded(examples)
    return {**batch, "labels": labels}


@pytest.fixture
def batch(examples: list[Tensor]) -> dict[str, Tensor]:
    return rows(examples, torch.tensor([0, 2, 1, 2]))


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], batch["attention_mask"]).logits


classify = objectives.get("sequence_classification")


def test_equals_the_models_own_loss(classifier: nn.Module, batch: dict[str, Tensor]) -> None:
    losses = classify(classifier, batch)
    assert list(losses) == ["ce"]
    torch.testing.assert_close(losses["ce"], classifier(**batch).loss)


def test_smoothing_and_class_weights_are_torchs(classifier: nn.Module, batch: dict[str, Tensor]) -> None:
    weights = [1.0, 2.0, 0.5]
    got = classify(classifier, batch, label_smoothing=0.2, class_weights=weights)["ce"]
    z = logits(classifier, batch)
    expected = F.cross_entropy(z, batch["labels"], weight=torch.tensor(weights), label_smoothing=0.2)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_accumulated_micro_batches_equal_the_whole(
    classifier: nn.Module, batch: dict[str, Tensor], weights: list[float] | None
) -> None:
    parts = [{k: v[at] for k, v in batch.items()} for at in (slice(0, 3), slice(3, 4))]
    items = sum(classify.count(part, class_weights=weights) for part in parts)
    options = {"class_weights": weights, "num_items": items}
    got = sum(classify(classifier, part, **options)["ce"] for part in parts)
    torch.testing.assert_close(got, classify(classifier, batch, class_weights=weights)["ce"])


def test_multi_label(classifier: nn.Module, examples: list[Tensor]) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    batch = rows(examples, labels)
    losses = classify(classifier, batch)
    assert list(losses) == ["bce"]
    z = logits(classifier, batch)
    torch.testing.assert_close(losses["bce"], F.binary_cross_entropy_with_logits(z, labels.float()))
    weighted = classify(classifier, batch, class_weights=[1.0, 3.0, 0.0], label_smoothing=0.1)["bce"]
    expected = F.binary_cross_entropy_with_logits(z, labels * 0.9 + 0.05, weight=torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(weighted, expected)
    measured = classify.measure({"logits": labels * 2.0 - 1.0, "labels": labels})
    assert measured["accuracy"] == measured["macro_f1"] == 1.0


def test_predictions_measure(classifier: nn.Module, batch: dict[str, Tensor]) -> None:
    predictions = classify.predict(classifier, batch)
    assert not predictions["logits"].requires_grad
    measured = classify.measure(predictions)
    right = (logits(classifier, batch).argmax(1) == batch["labels"]).float().mean().item()
    assert measured["accuracy"] == pytest.approx(right)
    assert measured["nll"] == pytest.approx(classify(classifier, batch)["ce"].item(), rel=1e-5)
    assert set(measured) == {"accuracy", "macro_f1", "nll"}


def test_labels_of_another_shape_are_an_error(classifier: nn.Module, examples: list[Tensor]) -> None:
    for wrong in (torch.rand(4), torch.zeros(4, 2), torch.zeros(3).long()):
        with pytest.raises(DataError, match="do not fit logits"):
            classify(classifier, rows(examples, wrong))


def test_wrong_number_of_class_weights_is_an_error(classifier: nn.Module, batch: dict[str, Tensor]) -> None:
    with pytest.raises(SettingsError, match="class_weights has 2 values, expected one for each of 3"):
        classify(classifier, batch, class_weights=[1.0, 2.0])
