from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox.core.errors import DataError, ModelError
from pegbox.data.collate import LabelCollator
from pegbox.data.encoded import EncodedLabel
from pegbox.train import probe as probes
from pegbox.train.probe import Features

from . import tiny


def blobs(rows: int, classes: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = 4 * torch.eye(classes, 6) + 3
    return Features(centres[labels] + torch.randn(rows, 6, generator=generator), labels)


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_finds_what_is_there(classes: int) -> None:
    probe = probes.linear_probe(blobs(90, classes, 0), blobs(30, classes, 1), classes)
    held = blobs(60, classes, 2)
    assert float(probe.logits(held.values).argmax(-1).eq(held.labels).float().mean()) > 0.9
    assert probe.weight.shape == (classes, 6)


def test_probe_never_says_a_class_it_has_not_seen() -> None:
    probe = probes.linear_probe(blobs(60, 3, 0), blobs(30, 3, 1), 5)
    assert int(probe.logits(blobs(60, 3, 2).values).argmax(-1).max()) <= 2


def test_without_held_out_rows_the_probe_chooses_on_a_fifth_and_learns_from_all() -> None:
    rows = blobs(60, 3, 0)
    probe = probes.linear_probe(rows, None, 3)
    assert probe.penalty in probes.PENALTIES
    torch.testing.assert_close(probe.weight, probes._probes(rows, (probe.penalty,), 3)[0].weight)


def test_features_are_what_the_head_reads() -> None:
    model = tiny.bert().eval()
    rows = [EncodedLabel([1, 2, 3], 0, "a"), EncodedLabel([4, 5], 2, "b")]
    collate = LabelCollator(0)
    found = probes.features(model, rows, collate)
    batch = collate(rows)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(model.classifier(found.values), logits)
    assert found.labels.tolist() == [0, 2]


def test_a_head_that_starts_from_the_probe_is_the_probe() -> None:
    probe = probes.linear_probe(blobs(60, 3, 0), blobs(30, 3, 1), 3)
    head, x = nn.Linear(6, 3), torch.randn(5, 6)
    probes.put(probe, head)
    torch.testing.assert_close(head(x), probe.logits(x))
    with pytest.raises(ModelError, match="warm_start=false"):
        probes.put(probe, nn.Linear(7, 3))


def test_rows_of_one_class_are_refused_and_two_rows_will_do() -> None:
    one = Features(torch.randn(6, 6), torch.zeros(6, dtype=torch.long))
    with pytest.raises(DataError, match="all 6 training rows are of one class"):
        probes.linear_probe(one, None, 2)
    two = probes.linear_probe(Features(torch.eye(2), torch.tensor([0, 1])), None, 2)
    assert two.penalty == 1.0
