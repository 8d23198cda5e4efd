"""DoRA: the norm that is never materialised, and PEFT's DoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox.methods.dora import DoRA, DoRAGraft

from .tiny import on_linear


def graft_of(bias: bool = False) -> tuple[DoRAGraft, torch.Tensor, nn.Module]:
    tuned, graft, w = on_linear(DoRA(rank=4, alpha=8.0, targets=".*"), 14, 10, bias=bias)
    assert isinstance(graft, DoRAGraft)
    return graft, w, tuned


def test_the_norm_is_that_of_the_materialised_sum() -> None:
    graft, w, _ = graft_of()
    want = (w + graft.scale * graft.b @ graft.a).norm(dim=1)
    assert torch.allclose(graft.norm(w), want, atol=1e-5)


def test_the_equation() -> None:
    """W' = m (W + s B A) / |W + s B A|, row by row, written as a loop."""
    graft, w, _ = graft_of()
    v = w + graft.scale * graft.b @ graft.a
    rows = torch.stack([graft.m[i] * v[i] / v[i].square().sum().sqrt() for i in range(len(v))])
    assert torch.allclose(graft.weight(w), rows, atol=1e-6)


def test_the_magnitude_is_the_length_of_every_row() -> None:
    graft, w, _ = graft_of()
    assert torch.allclose(graft.weight(w).norm(dim=1), graft.m.abs(), atol=1e-5)


def test_the_bias_is_not_rescaled() -> None:
    graft, w, tuned = graft_of(bias=True)
    x = torch.randn(3, 10)
    bias = tuned.model[0].bias  # type: ignore[index]
    assert torch.allclose(tuned(x), x @ graft.weight(w).T + bias, atol=1e-5)


def test_the_norm_counts_as_a_constant_in_the_gradient() -> None:
    """Section 4.3: the gradient of V = W + s B A is m / |V| times that of W', without the projection."""
    graft, w, tuned = graft_of()
    x, g = torch.randn(5, 10), torch.randn(5, 14)
    tuned(x).backward(g)
    v = w + graft.scale * graft.b @ graft.a
    grad_v = (graft.m / v.norm(dim=1))[:, None] * (g.T @ x)
    assert graft.b.grad is not None
    assert torch.allclose(graft.b.grad, graft.scale * grad_v @ graft.a.T, atol=1e-4)


def test_pefts_dora_without_the_switch_is_lora(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A configuration from before DoRA has no `use_dora`; it is LoRA's."""
    import json

    from safetensors.torch import load_file, save_file

    import pegbox

    from .tiny import family

    pegbox.tune(family("llama"), "lora", rank=4).save(tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["use_dora"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert pegbox.load(family("llama"), tmp_path).method.name() == "lora"


@pytest.mark.parametrize("rank", [1, 4])
def test_parameters(rank: int) -> None:
    tuned, *_ = on_linear(DoRA(rank=rank, targets=".*"), 14, 10)
    assert tuned.count()[0] == rank * (14 + 10) + 14
