"""Attention in blocks is attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import pegbox
from pegbox.core.causal_attention import causal_attention


def inputs(length: int, dtype: torch.dtype, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, n, length, 16, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_and_its_gradients_are_those_of_the_plain_equation(length: int, groups: int) -> None:
    given = inputs(length, torch.float64, groups=groups)
    theirs = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)
    ours = causal_attention(*given)
    error = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, atol=1e-12)
    expected = torch.autograd.grad(theirs, given, error)
    for mine, other in zip(torch.autograd.grad(ours, given, error), expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_in_bfloat16_it_is_as_exact_as_bfloat16_and_autocast_brings_it_there() -> None:
    single = inputs(150, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = causal_attention(*single)
    theirs = F.scaled_dot_product_attention(*single, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).abs().max() < 2e-2
    for mine, other in zip(
        torch.autograd.grad(ours.float().square().sum(), single),
        torch.autograd.grad(theirs.square().sum(), single),
        strict=True,
    ):
        assert (mine - other).norm() < 2e-2 * other.norm()


def test_views_of_a_projection_are_read_as_they_lie() -> None:
    given = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(70, torch.float64)
    ]
    theirs = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)
    ours = causal_attention(*given)
    assert torch.allclose(ours, theirs)
    mine = torch.autograd.grad(ours.square().sum(), given)
    assert all(
        torch.allclose(a, b) for a, b in zip(mine, torch.autograd.grad(theirs.square().sum(), given), strict=True)
    )


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, attn_implementation="sdpa", **shape)
    return LlamaForCausalLM(config).bfloat16().train()


def calls(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths that this file's attention is called with, from now on."""
    monkeypatch.setattr("pegbox.core.causal_attention.multiplies_bf16", lambda: True)
    lengths: list[int] = []

    def noted(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return causal_attention(query, *rest)

    monkeypatch.setattr("pegbox.core.causal_attention.causal_attention", noted)
    return lengths


def test_a_model_that_trains_in_bfloat16_attends_in_blocks(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = pegbox.tune(llama, "full")
    ids = torch.randint(0, 64, (2, 70))
    theirs = llama(input_ids=ids, labels=ids).loss
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    lengths = calls(llama, monkeypatch)
    ours = tuned(input_ids=ids, labels=ids).loss
    ours.backward()
    assert lengths == [70, 70]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    for name, p in llama.named_parameters():
        assert (p.grad - expected[name]).norm() <= 5e-2 * expected[name].norm()


def test_padding_recomputed_blocks_and_float32_stay_the_models_own(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, tuned, ids = calls(llama, monkeypatch), pegbox.tune(llama, "full"), torch.randint(0, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    tuned(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        tuned(input_ids=ids)
    llama.activation_checkpointing_enable({"use_reentrant": False})
    tuned(input_ids=ids, labels=ids).loss.backward()
    llama.activation_checkpointing_disable()
    llama.float()
    tuned(input_ids=ids)
    assert lengths == []
