"""Series adapters by the card of LLM-Adapters: counts, formulas, both starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.models import text
from pegbox.core.bottleneck import ACTIVATIONS
from pegbox.methods.series import Series, SeriesGraft

from .tiny import family, on_linear


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_formula(activation: str) -> None:
    """z = W x + b; y = z + s U act(D z)."""
    method = Series(bottleneck=3, activation=activation, scale=0.7, targets=".*")  # type: ignore[arg-type]
    tuned, graft, w = on_linear(method, 12, 10, bias=True)
    assert isinstance(graft, SeriesGraft)
    x = torch.randn(4, 10)
    z = F.linear(x, w, tuned.model[0].bias)  # type: ignore[index]
    act = {
        "tanh": torch.tanh,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    assert torch.allclose(tuned(x), z + 0.7 * act(z @ graft.down.T) @ graft.up.T, atol=1e-6)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_before_a_projection(learn_scale: bool) -> None:
    """y = W (x + s (U tanh(D x + d) + u)) + b."""
    method = Series(bottleneck=3, scale=0.7, learn_scale=learn_scale, bias=True, targets=(), inputs=".*")
    tuned, graft, w = on_linear(method, 12, 10, bias=True)
    p = dict(graft.named_parameters())
    assert p["down"].shape == (3, 10)
    assert p["up"].shape == (10, 3)
    x = torch.randn(4, 10)
    f = p.get("scale", 0.7) * F.linear(torch.tanh(F.linear(x, p["down"], p["down_bias"])), p["up"], p["up_bias"])
    want = F.linear(x + f, w, tuned.model[0].bias)  # type: ignore[index]
    assert torch.allclose(tuned(x), want, atol=1e-5)


def test_what_both_name_is_an_input() -> None:
    tuned = pegbox.tune(family("llama"), "series", inputs="mlp.down", layers="0", bottleneck=4)
    widths = {path.rpartition(".")[2]: site.chain[0].down.shape[1] for path, site in tuned.sites.items()}  # type: ignore[union-attr, index]
    assert widths == {"o_proj": 32, "down_proj": 48}


@pytest.mark.parametrize(
    ("preset", "sites", "numbers"),
    [
        ("houlsby", ["down_proj", "o_proj"], 2 * (2 * 4 * 32 + 4 + 32)),
        ("pfeiffer", ["down_proj"], 2 * 4 * 32 + 4 + 32),
        ("llm-adapters", ["down_proj", "gate_proj", "up_proj"], 3 * 2 * 4 * 32),
        ("llm-adapters-pfeiffer", ["down_proj"], 2 * 4 * 32),
    ],
)
def test_presets_stand_where_their_papers_say(preset: str, sites: list[str], numbers: int) -> None:
    """2 b i on the input side, 2 b o on the output side, biases where the paper has them."""
    tuned = pegbox.tune(family("llama"), "series", preset=preset, bottleneck=4)
    assert sorted({p.rpartition(".")[2] for p in tuned.sites}) == sites
    assert tuned.count()[0] == 2 * numbers


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
    drawn = pegbox.tune(family("llama"), "series", bottleneck=4, start="bert")(**text(0)).logits
    distance = (drawn - want).norm() / want.norm()
    assert 0 < distance < 1e-2


def test_only_the_adapter_trains() -> None:
    tuned = pegbox.tune(family("llama"), "series", bottleneck=4)
    assert all(key.endswith((".down", ".up")) for key in tuned.trainable())
    assert not any(p.requires_grad for p in tuned.model.parameters())
