"""Parallel adapters by the card of LLM-Adapters: formula, counts, starts, and LoRA where nothing is non-linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.models import text
from pegbox.core.errors import SettingsError
from pegbox.methods.parallel import Parallel

from .tiny import family, on_linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_the_formula(bias: bool, learn_scale: bool) -> None:
    """y = W x + b + s (U tanh(D x + d) + u)."""
    method = Parallel(bottleneck=3, scale=0.7, bias=bias, learn_scale=learn_scale, targets=".*")
    tuned, graft, w = on_linear(method, 12, 10, bias=True)
    p = dict(graft.named_parameters())
    x = torch.randn(4, 10)
    h = torch.tanh(F.linear(x, p["down"], p.get("down_bias")))
    want = F.linear(x, w, tuned.model[0].bias) + p.get("scale", 0.7) * F.linear(h, p["up"], p.get("up_bias"))  # type: ignore[index]
    assert torch.allclose(tuned(x), want, atol=1e-6)
    assert ("down_bias" in p, "scale" in p) == (bias, learn_scale)


def test_parameters_of_the_card() -> None:
    """b (i + o) a site; no biases."""
    tuned = pegbox.tune(family("llama"), "parallel", bottleneck=4)
    assert tuned.count()[0] == 2 * 2 * 4 * (32 + 48)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_without_a_non_linearity_it_is_lora(learn_scale: bool) -> None:
    """The same function as a LoRA of scale s, and it merges."""
    method = Parallel(bottleneck=3, scale=0.7, learn_scale=learn_scale, activation="identity", targets=".*")
    tuned, graft, w = on_linear(method, 12, 10)
    p = dict(graft.named_parameters())
    lora = pegbox.tune(
        torch.nn.Sequential(torch.nn.Linear(10, 12, bias=False)), "lora", rank=3, alpha=3.0, targets=".*"
    )
    lora.model[0].weight.data = w  # type: ignore[index]
    lora.load_state({"graft.0.a": p["down"].detach(), "graft.0.b": (p.get("scale", 0.7) * p["up"]).detach()})
    x = torch.randn(4, 10)
    want = lora(x)
    assert torch.allclose(tuned(x), want, atol=1e-6)
    assert torch.allclose(tuned.merge()(x), want, atol=1e-6)


def test_traits_go_by_the_activation() -> None:
    assert (Parallel.traits.merge, Parallel.traits.seams) == ("no", ("output",))
    assert Parallel(activation="relu").traits == Parallel.traits
    linear = Parallel(activation="identity").traits
    assert (linear.merge, linear.seams, linear.to_lora) == ("exact", ("weight",), True)


def test_biases_without_a_non_linearity_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"parallel\.bias must be false where activation='identity'"):
        pegbox.tune(family("llama"), "parallel", activation="identity", bias=True)


def test_starts() -> None:
    """With U = 0 the base; LLM-Adapters' own start is within 1e-2 of it."""
    want = family("llama")(**text(0)).logits
    assert torch.equal(pegbox.tune(family("llama"), "parallel", bottleneck=4)(**text(0)).logits, want)
    drawn = pegbox.tune(family("llama"), "parallel", preset="llm-adapters", bottleneck=4)(**text(0)).logits
    assert 0 < (drawn - want).norm() / want.norm() < 1e-2
