"""Full fine-tuning trains everything, or what is named."""

from __future__ import annotations

import pytest

import pegbox

from .tiny import family


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mlp"])
def test_everything_trains(name: str) -> None:
    model = family(name)
    numbers = sum(p.numel() for p in model.parameters())
    tuned = pegbox.tune(model, "full")
    assert tuned.count() == (numbers, numbers)
    assert {k.removeprefix("base.") for k in tuned.trainable()} == {n for n, _ in model.named_parameters()}


def test_targets_and_layers_choose() -> None:
    tuned = pegbox.tune(family("llama"), "full", targets="block", layers="1")
    assert tuned.trainable()
    assert all(k.startswith("base.model.layers.1.") for k in tuned.trainable())


def test_the_state_is_the_tensors_that_train() -> None:
    tuned = pegbox.tune(family("llama"), "full", targets="mlp")
    assert tuned.state().keys() == tuned.trainable().keys()
