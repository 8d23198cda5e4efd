"""Ladder side-tuning: its equation, sizes and start, and that it works where text is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox import objectives
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES, inputs
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.headless import LogitRule, logit_rule
from pegbox.core.taps import Tape
from pegbox.methods.ladder import LadderGraft, SideBlock

from .tiny import family

NAMES = ("llama", "gpt2", "bert", "t5", "vit")
SETTINGS: dict[str, Any] = {"reduction": 4, "heads": 2}


def tuned_on(name: str, **settings: Any) -> Any:
    return pegbox.tune(family(name), "ladder", **SETTINGS | settings)


def side(tuned: Any, path: str) -> LadderGraft:
    (graft,) = tuned.sites[path].chain
    assert isinstance(graft, LadderGraft)
    return graft


def test_the_equation() -> None:
    """s_l = block(m s + (1 - m) D h_l), z' = z + U norm(s_L), by hand from the base's own hidden states."""
    tuned, batch = shake(tuned_on("llama")), inputs(FAMILIES["llama"].batch(0))
    base = family("llama")
    hidden = base.model(**batch, output_hidden_states=True)
    captured: list[Tensor] = []
    base.model.layers[-1].register_forward_hook(lambda m, a, out: captured.append(out))
    final = base.model(**batch).last_hidden_state
    graft = side(tuned, "model")
    outputs = [*hidden.hidden_states[1:-1], captured[0]]
    s = graft.down[0](hidden.hidden_states[0])
    for i, h in enumerate(outputs):
        m = torch.sigmoid(graft.gate[i] / 0.1)
        x = m * s + (1 - m) * graft.down[i + 1](h)
        block = graft.block[i]
        assert isinstance(block, SideBlock)
        s = block(x, Tape("test"), i, True)
    want = base.lm_head(final + graft.last(graft.norm(s)))
    assert torch.allclose(tuned(**batch).logits, want, atol=1e-5)


def test_a_side_block_attends_to_the_past_only() -> None:
    torch.manual_seed(0)
    block, x = SideBlock(8, 2, False), torch.randn(1, 5, 8)
    changed = x.clone()
    changed[:, 3:] = torch.randn(1, 2, 8)
    first, second = block(x, Tape("a"), 0, True), block(changed, Tape("a"), 0, True)
    assert torch.allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert not torch.allclose(first[:, 3:], second[:, 3:], atol=1e-3)
    both = block(x, Tape("a"), 0, False), block(changed, Tape("a"), 0, False)
    assert not torch.allclose(both[0][:, :3], both[1][:, :3], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"layers": "-1"}, {"reduction": 2, "heads": 4}])
def test_parameters(name: str, settings: dict[str, Any]) -> None:
    tuned = tuned_on(name, **settings)
    method: Any = tuned.method
    assert tuned.count()[0] == sum(method.size(site) for site in tuned.sites.values())


def test_parameters_by_hand() -> None:
    """d = 32, n = 8, two blocks: three D, two gates, two side blocks, a norm and U."""
    n, d = 8, 32
    block = 4 * n * n + 2 * (2 * n) + (n * 4 * n + 4 * n) + (4 * n * n + n)
    want = 3 * (d * n + n) + 2 + 2 * block + 2 * n + (n * d + d)
    assert tuned_on("llama").count()[0] == want


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_start_draws_the_last_projection(name: str) -> None:
    want = family(name)(**inputs(FAMILIES[name].batch(0))).logits
    assert torch.allclose(tuned_on(name)(**inputs(FAMILIES[name].batch(0))).logits, want, atol=1e-6)
    drawn = tuned_on(name, identity=False)(**inputs(FAMILIES[name].batch(0))).logits
    assert not torch.allclose(drawn, want, atol=1e-3)


def test_gates_start_in_the_middle_and_open_by_their_temperature() -> None:
    graft = side(tuned_on("llama"), "model")
    assert torch.equal(graft.gate, torch.zeros(2))
    assert graft.temperature == 0.1


def test_gradients_are_right() -> None:
    """Finite differences: nothing is missing where the trunk runs without autograd."""
    for name in ("llama", "t5"):
        tuned = shake(tuned_on(name)).double()
        for adapter in tuned.adapters.values():
            for parameter in adapter.parameters():
                parameter.data = parameter.data.double()
        batch = inputs(FAMILIES[name].batch(0))
        tuned(**batch).logits.square().mean().backward()
        for key, parameter in list(tuned.trainable().items())[::5]:
            flat, at = parameter.data.view(-1), parameter.numel() // 2
            old, eps = flat[at].item(), 1e-5
            sides = []
            for value in (old + eps, old - eps):
                flat[at] = value
                sides.append(tuned(**batch).logits.square().mean().item())
            flat[at] = old
            numeric = (sides[0] - sides[1]) / (2 * eps)
            assert parameter.grad.view(-1)[at].item() == pytest.approx(numeric, rel=1e-3, abs=1e-6), (name, key)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_with_and_without_the_cache(name: str) -> None:
    tuned, batch = shake(tuned_on(name)), inputs(FAMILIES[name].batch(0))
    ids = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(tuned.generate(**ids, use_cache=True), tuned.generate(**ids, use_cache=False))


def test_a_packed_row_is_its_examples() -> None:
    """Blocks attend within an example, and so do the side's, by the same mask."""
    tuned, ids = shake(tuned_on("llama")), inputs(FAMILIES["llama"].batch(0))["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = tuned(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = [tuned(input_ids=part, use_cache=False).logits for part in (ids[:, :3], ids[:, 3:])]
    assert torch.allclose(packed, torch.cat(apart, dim=1), atol=1e-5)


def test_the_chunked_head_gives_the_same_loss() -> None:
    tuned, batch = shake(tuned_on("llama")), FAMILIES["llama"].batch(0)
    assert logit_rule(tuned, inputs(batch)) == LogitRule()
    losses = objectives.get("causal_lm")(tuned, batch)
    losses["nll"].backward()
    chunked = {k: p.grad.clone() for k, p in tuned.trainable().items()}
    tuned.zero_grad()
    whole = tuned(**batch).loss
    whole.backward()
    assert torch.allclose(losses["nll"], whole, atol=1e-5)
    assert all(torch.allclose(chunked[k], p.grad, atol=1e-5) for k, p in tuned.trainable().items())


def test_mistakes() -> None:
    with pytest.raises(SettingsError, match=r"32 / reduction 4 = 8 .* heads=3; nearest: heads=2"):
        tuned_on("llama", heads=3)
    with pytest.raises(SettingsError, match="reduction 64"):
        tuned_on("llama", reduction=64)
    with pytest.raises(TargetError, match="block"):
        tuned_on("mlp")
