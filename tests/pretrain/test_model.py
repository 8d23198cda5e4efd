"""The architecture, its counts, and the shrunk gradient of the embedding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pegbox import objectives
from pegbox.core.errors import SettingsError
from pegbox.pretrain.model import build, estimate, parameters, shrink_gradient
from pegbox.pretrain.settings import ModelSettings, TrainSettings, recipe
from pegbox.recipes.shipped import recipes

SMALL: dict[str, Any] = {"hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 48}
RECIPE = recipe(yaml.safe_load(recipes()["geb_1b3.yaml"].read_text()))
GEB = RECIPE.model


def ids(rows: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss(model: Any, batch: Tensor) -> Tensor:
    (nll,) = objectives.get("causal_lm")(model, {"input_ids": batch, "labels": batch}).values()
    return nll


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"kv_heads": None}, {"mlp": None}])
def test_parameters_are_counted_by_formula(changes: dict[str, Any]) -> None:
    settings = ModelSettings(**SMALL | changes)
    model = build(settings, 300, 64, 0)
    assert parameters(settings, 300) == sum(p.numel() for p in model.parameters())


def test_geb_has_the_parameters_of_its_card() -> None:
    norms = (2 * 24 + 1) * 2048
    assert parameters(GEB, 64_896) == 2 * 64_896 * 2048 + 24 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 5632) + norms
    assert parameters(GEB, 64_896) / 1e9 == pytest.approx(1.35, abs=0.005)


def test_the_start_is_drawn_from_the_seed_alone_and_knows_nothing() -> None:
    torch.manual_seed(1)
    one = build(ModelSettings(**SMALL), 300, 64, 7)
    torch.manual_seed(2)
    two = build(ModelSettings(**SMALL), 300, 64, 7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert loss(one, ids()).item() == pytest.approx(math.log(300), abs=0.1)
    deviations = [one.model.layers[0].mlp.up_proj.weight.std(), one.model.layers[0].mlp.down_proj.weight.std()]
    assert deviations[0].item() == pytest.approx(0.02, rel=0.05)
    assert (deviations[1] / deviations[0]).item() == pytest.approx(1 / math.sqrt(6), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": 5}, "multiple of twice model.heads, 10"),
        ({"kv_heads": 3}, "multiple of model.kv_heads, got 3"),
        ({"attention": "spda"}, "'spda'.*did you mean 'sdpa'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        build(ModelSettings(**SMALL | changes), 300, 64, 0)


def test_our_attention_is_sdpa_on_rows_padding_and_caches() -> None:
    ours, theirs = (build(ModelSettings(**SMALL, attention=name), 300, 64, 0).eval() for name in ("auto", "sdpa"))
    batch, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    for inputs in ({"input_ids": batch}, {"input_ids": batch, "attention_mask": mask}):
        assert torch.allclose(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5)
    kept = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(batch[:1], **kept), theirs.generate(batch[:1], **kept))
    assert "pegbox" not in ours.config.to_json_string()


@pytest.mark.parametrize("tied", [True, False])
def test_the_embeddings_gradient_is_shrunk_and_nothing_else(tied: bool) -> None:
    settings = ModelSettings(**SMALL, tied=tied)
    plain, shrunk = (build(settings, 300, 64, 0) for _ in range(2))
    handle = shrink_gradient(shrunk, 0.1)
    losses = [loss(model, ids()) for model in (plain, shrunk)]
    assert torch.equal(*losses)
    for value in losses:
        value.backward()
    theirs, ours = (dict(model.named_parameters()) for model in (plain, shrunk))
    name = "model.embed_tokens.weight"
    assert all(torch.equal(ours[n].grad, theirs[n].grad) for n in ours if n != name)
    from_head = _head_gradient(build(settings, 300, 64, 0)) if tied else torch.zeros(300, 32)
    assert torch.allclose(ours[name].grad - from_head, 0.1 * (theirs[name].grad - from_head), atol=1e-7)
    handle.remove()
    assert not shrunk.get_input_embeddings()._forward_hooks


def _head_gradient(model: Any) -> Tensor:
    """Of tied weights: by the head alone."""
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    hidden = model.model(ids()).last_hidden_state.detach()
    torch.nn.functional.cross_entropy((hidden[:, :-1] @ weight.t()).flatten(0, 1), ids()[:, 1:].flatten()).backward()
    return weight.grad


@pytest.mark.parametrize("tied", [True, False])
def test_activations_are_those_that_autograd_keeps(tied: bool) -> None:
    settings = ModelSettings(hidden=64, layers=6, heads=4, kv_heads=2, tied=tied)
    model, batch = build(settings, 300, 256, 0), ids(8, 256)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        value = loss(model, batch)
    expected = estimate(settings, 300, 256, TrainSettings(batch=8)).activations
    weights = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)  # in bfloat16, as autocast keeps them
    assert sum(kept.values()) - weights == pytest.approx(expected, rel=0.25)
    value.backward()


def test_geb_takes_what_its_card_says() -> None:
    training = RECIPE.train
    assert training.steps * training.batch * training.accumulate * RECIPE.rows.length == pytest.approx(550e9, rel=1e-5)
    one, eight, many = (estimate(GEB, 64_896, 4096, training, devices=n) for n in (1, 8, 64))
    assert one.weights == 8 * eight.weights == 64 * many.weights == 4 * parameters(GEB, 64_896)
    assert one.flops_per_token == pytest.approx(6 * 1.215e9 + 6 * 24 * 2048 * 4096, rel=1e-3)
    assert eight.days(550e9, 100e12, devices=64) == pytest.approx(550e9 * one.flops_per_token / 2.56e15 / 86400)
