"""Series adapters by the card of LLM-Adapters: counts, formulas, both starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.models import text
from pegbox.methods.series import ACTIVATIONS, Series, SeriesGraft

from .tiny import family, on_linear


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_formula(activation: str) -> None:
    """z = W x + b; y = z + s U act(D z)."""
    method = Series(bottleneck=3, activation=activation, scale=0.7, targets=".*")  # type: ignore[arg-type]
    tuned, graft, w = on_linear(method, 12, 10, bias=True)
    assert isinstance(graft, SeriesGraft)
    x = torch.randn(4, 10)
    z = F.linear(x, w, tuned.model[0].bias)  # type: ignore[index]
    act = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]
    assert torch.allclose(tuned(x), z + 0.7 * act(z @ graft.down.T) @ graft.up.T, atol=1e-6)


def test_parameters_of_the_card() -> None:
    """2 b o a site on the output side, after attention and after the MLP of every block; no biases."""
    tuned = pegbox.tune(family("llama"), "series", bottleneck=4)
    assert tuned.count()[0] == 2 * 2 * (2 * 4 * 32)
    assert {p.ndim for p in tuned.trainable().values()} == {2}
    assert sorted(p.rpartition(".")[2] for p in tuned.sites) == ["down_proj", "down_proj", "o_proj", "o_proj"]


def test_the_default_start_is_the_base_and_the_other_is_near_it() -> None:
    """With U = 0 exactly; with both drawn from N(0, 0.02^2), within 1e-2 of the base."""
    want = family("llama")(**text(0)).logits
    assert torch.equal(pegbox.tune(family("llama"), "series", bottleneck=4)(**text(0)).logits, want)
    drawn = pegbox.tune(family("llama"), "series", bottleneck=4, identity=False)(**text(0)).logits
    distance = (drawn - want).norm() / want.norm()
    assert 0 < distance < 1e-2


def test_only_the_adapter_trains() -> None:
    tuned = pegbox.tune(family("llama"), "series", bottleneck=4)
    assert all(key.endswith((".down", ".up")) for key in tuned.trainable())
    assert not any(p.requires_grad for p in tuned.model.parameters())
