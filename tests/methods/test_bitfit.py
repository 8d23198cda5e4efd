"""BitFit trains the biases, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import pegbox
from pegbox.core.errors import TargetError

from .tiny import family


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_all_biases_train(name: str) -> None:
    model = family(name)
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    tuned = pegbox.tune(model, "bitfit")
    assert {k.removeprefix("graft.").removesuffix(".d") for k in tuned.trainable()} == {n[:-5] for n in biases}
    assert tuned.count()[0] == sum(biases.values())


def test_targets_choose_among_them() -> None:
    tuned = pegbox.tune(family("bert"), "bitfit", targets=("mlp.up", "mlp.down"), layers="1")
    block = "graft.bert.encoder.layer.1"
    assert tuned.trainable().keys() == {f"{block}.intermediate.dense.d", f"{block}.output.dense.d"}


def test_vectors_are_not_decayed() -> None:
    (group,) = pegbox.tune(family("bert"), "bitfit").groups(1e-3, 0.1)
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("build", [lambda: family("llama"), lambda: nn.Sequential(nn.Linear(3, 3, bias=False))])
def test_a_model_without_biases_is_refused(build: Callable[[], nn.Module]) -> None:
    model = build()
    with pytest.raises(TargetError, match=r"bitfit trains biases, and .* names no module of this model that has one"):
        pegbox.tune(model, "bitfit")
