from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pegbox import objectives
from pegbox.core.errors import DataError

from .conftest import padded


@pytest.mark.parametrize("mask", ["assistant_masks", "completion_mask"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_mask_makes_or_narrows_the_labels(llama: nn.Module, examples: list[Tensor], mask: str, labels: bool) -> None:
    batch = padded(examples, prompt=4)
    expected = objectives.get("causal_lm")(llama, batch)["nll"]
    wide = padded(examples, prompt=0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    given[mask] = (batch["labels"] != -100).long()
    if labels:
        given["labels"] = wide["labels"]
    sft = objectives.get("sft")
    assert sft(llama, given)["nll"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert sft.count(given) == objectives.get("causal_lm").count(batch)
    assert sft.measure(sft.predict(llama, given))["nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_alone_are_enough(llama: nn.Module, examples: list[Tensor]) -> None:
    batch = padded(examples)
    assert torch.equal(objectives.get("sft")(llama, batch)["nll"], objectives.get("causal_lm")(llama, batch)["nll"])


def test_neither_labels_nor_mask_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(DataError, match="needs 'labels' or one of"):
        objectives.get("sft")(llama, {"input_ids": torch.ones(1, 3).long()})
