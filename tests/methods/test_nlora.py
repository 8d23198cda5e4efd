"""SLoRA, NLoRA, IntTune: the invariants of their card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pegbox
from pegbox.core.errors import SettingsError
from pegbox.methods.nlora import NLoRA, NLoRAGraft

from .tiny import family, on_linear

OUT, IN, RANK = 10, 14, 4


def put(**settings: object) -> tuple[pegbox.core.Tuned, NLoRAGraft, torch.Tensor]:
    tuned, graft, w = on_linear(NLoRA(rank=RANK, alpha=6.0, targets=".*", **settings), OUT, IN, seed=None)  # type: ignore[arg-type]
    assert isinstance(graft, NLoRAGraft)
    return tuned, graft, w


def test_slora_starts_as_the_base_and_b_learns_first() -> None:
    tuned, graft, w = put(start="random")
    x = torch.randn(3, IN)
    assert tuned(x).equal(torch.nn.functional.linear(x, w))
    optimizer = torch.optim.SGD(tuned.groups(1.0))
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        tuned(x).square().sum().backward()
        seen.append({name: p.grad.abs().max().item() > 0 for name, p in graft.named_parameters() if p.grad is not None})
        optimizer.step()
    assert seen == [{"a": False, "n": False, "b": True}, {"a": True, "n": True, "b": True}]


def test_nlora_starts_from_the_leading_parts_and_moves_the_model_by_as_much() -> None:
    tuned, graft, w = put()
    assert graft.a.equal(w[:RANK])
    assert graft.n.equal(w[:RANK, :RANK])
    assert graft.b.equal(w[:, :RANK])
    moved = 6.0 / RANK * w[:, :RANK] @ w[:RANK, :RANK] @ w[:RANK]
    x = torch.randn(3, IN)
    torch.testing.assert_close(tuned(x), x @ (w + moved).T, rtol=1e-4, atol=1e-5)


def test_a_start_taken_out_leaves_the_base() -> None:
    tuned, graft, w = put(subtract=True)
    x = torch.randn(3, IN)
    assert tuned(x).equal(torch.nn.functional.linear(x, w))
    with torch.no_grad():
        graft.n.mul_(2)
    moved = 6.0 / RANK * w[:, :RANK] @ w[:RANK, :RANK] @ w[:RANK]
    torch.testing.assert_close(tuned(x), x @ (w + moved).T, rtol=1e-4, atol=1e-5)


def test_inttune_trains_and_saves_the_middle_alone(tmp_path: Path) -> None:
    model = family("llama")
    tuned = pegbox.tune(model, "nlora", preset="inttune", rank=4)
    linears = len(tuned.sites)
    assert tuned.count()[0] == linears * 16
    with torch.no_grad():
        for p in tuned.trainable().values():
            p.add_(torch.randn_like(p))
    tuned.save(tmp_path)
    assert sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values()) == linears * 16
    ids = torch.arange(6)[None]
    want = tuned.eval()(ids).logits
    tuned.detach()
    torch.testing.assert_close(pegbox.load(family("llama"), tmp_path)(ids).logits, want)


def test_numbers_and_rank_are_the_cards() -> None:
    _, graft, w = put()
    assert sum(p.numel() for p in graft.parameters()) == RANK * (OUT + IN) + RANK**2
    assert torch.linalg.matrix_rank((graft.weight(w) - w).detach(), rtol=1e-4) <= RANK


@pytest.mark.parametrize("settings", [{"subtract": True}, {"train": "middle"}])
def test_what_needs_the_bases_parts_is_refused_with_drawn_ones(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="start='nystrom'"):
        pegbox.tune(family("llama"), "nlora", start="random", rank=4, **settings)
