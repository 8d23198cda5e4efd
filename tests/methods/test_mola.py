"""MoLA against its equation, written out, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.checks.lab import shake
from pegbox.core.errors import SettingsError
from pegbox.core.mixture import Route, balance, chosen
from pegbox.core.tuned import Tuned
from pegbox.methods.lora import LoRA
from pegbox.methods.mola import MoLA, MoLAGraft

from .tiny import family, on_linear


def layer(**settings: Any) -> tuple[Tuned, MoLAGraft, Tensor]:
    """One matrix (5, 6) under experts with random values."""
    tuned, graft, w = on_linear(MoLA(targets=".*", rank=2, **settings), 5, 6, seed=None)
    assert isinstance(graft, MoLAGraft)
    shake(tuned, 1, 1.0)
    return tuned, graft, w


def by_hand(graft: MoLAGraft, w: Tensor, x: Tensor, top_k: int) -> Tensor:
    """A token at a time, an expert at a time."""
    out = []
    for token in x:
        p = (graft.router @ token).softmax(0)
        best = p.topk(top_k).indices.tolist()
        y = w @ token
        for e in best:
            a, b = graft.experts[e].a, graft.experts[e].b
            y = y + p[e] / p[best].sum() * 8.0 * (b @ (a @ token))  # alpha / rank
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_token_gets_its_experts(top_k: int) -> None:
    tuned, graft, w = layer(experts=4, top_k=top_k)
    x = torch.randn(7, 6)
    assert torch.allclose(tuned(x), by_hand(graft, w, x, top_k), rtol=1e-4, atol=1e-4)


def test_one_expert_is_lora() -> None:
    tuned, graft, _ = layer(experts=1)
    lora, _, _ = on_linear(LoRA(targets=".*", rank=2, alpha=16.0), 5, 6)
    lora.load_state({"graft.0.a": graft.experts[0].a, "graft.0.b": graft.experts[0].b})  # type: ignore[dict-item]
    x = torch.randn(7, 6)
    assert torch.allclose(tuned(x), lora(x), atol=1e-5)


def test_experts_that_are_not_chosen_get_no_gradient() -> None:
    tuned, graft, _ = layer(experts=4, top_k=2)
    x = torch.randn(1, 6)
    tuned(x).sum().backward()
    used = set((graft.router @ x[0]).topk(2).indices.tolist())
    for e, expert in enumerate(graft.experts):
        assert bool(expert.a.grad.any()) == (e in used)  # type: ignore[union-attr, operator]


def test_weights_sum_to_one() -> None:
    weights = chosen(torch.randn(50, 6), 2)
    assert torch.allclose(weights.sum(-1), torch.ones(50))
    assert (weights > 0).sum(-1).eq(2).all()


def test_balance_is_one_where_experts_are_used_alike_and_e_where_one_has_all() -> None:
    even = torch.eye(4).repeat(3, 1)
    assert balance([_route(0 * even, chosen(even, 1))]).item() == pytest.approx(1)
    lone = torch.tensor([[50.0, 0, 0, 0]]).expand(12, 4)
    assert balance([_route(lone, chosen(lone, 1))]).item() == pytest.approx(4)


def test_the_layers_of_a_block_are_balanced_together() -> None:
    first, second = (torch.tensor([row]).expand(5, 2) for row in ([9.0, 0], [0, 9.0]))
    apart = [balance([_route(x, chosen(x, 1))]).item() for x in (first, second)]
    both = balance([_route(x, chosen(x, 1)) for x in (first, second)]).item()
    assert min(apart) > 1.9
    assert both == pytest.approx(1)


def _route(logits: Tensor, weights: Tensor, mask: Tensor | None = None) -> Route:
    return Route(logits, weights, mask)


def test_padding_does_not_count() -> None:
    tuned = pegbox.tune(family("llama"), "mola", rank=2, experts=3)
    ids = torch.randint(3, 20, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = []
    for filler in (0, 7):
        padded = torch.where(mask.bool(), ids, filler)
        tuned(input_ids=padded, attention_mask=mask)
        found.append(tuned.penalty())
    assert torch.equal(*found)  # type: ignore[arg-type]
    tuned(input_ids=ids)
    assert not torch.equal(tuned.penalty(), found[0])  # type: ignore[arg-type]


def test_the_balance_pulls_a_collapsed_router_apart() -> None:
    tuned, graft, _ = layer(experts=3, top_k=1, balance=1.0)
    with torch.no_grad():
        graft.router.copy_(torch.tensor([[1.0] * 6, [0.0] * 6, [0.0] * 6]))
    x = torch.rand(64, 6)
    optimizer = torch.optim.Adam([graft.router], 0.05)  # type: ignore[list-item]
    losses = []
    for _ in range(40):
        tuned(x)
        loss = tuned.penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(loss.item())  # type: ignore[union-attr]
    assert losses[0] > 2
    assert losses[-1] < 1.1


def test_counts_by_block() -> None:
    tuned = pegbox.tune(family("llama"), "mola", rank=2, experts=(1, 3))
    counts = {path.split(".")[2]: len(site.grafts["default"].experts) for path, site in tuned.sites.items()}  # type: ignore[arg-type]
    assert counts == {"0": 1, "1": 3}
    with pytest.raises(SettingsError, match="lists 3 blocks, and this model has 2"):
        pegbox.tune(family("llama"), "mola", experts=(1, 2, 3))


def test_routes_are_handed_out_once_and_made_only_for_gradients() -> None:
    tuned, _, _ = layer(experts=3)
    context = tuned.context
    with torch.no_grad():
        tuned(torch.randn(4, 6))
    assert not context.routes
    tuned(torch.randn(4, 6))
    assert context.routes
    assert tuned.extra_losses()
    assert not tuned.extra_losses()
