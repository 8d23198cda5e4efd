"""Compacter by its card: Kronecker sums, one C, counts, norms that are copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.lab import bits, require_same_bits, shake
from pegbox.checks.models import text, translation
from pegbox.core.errors import SettingsError
from pegbox.core.files import read
from pegbox.methods.compacter import Compacter, CompacterGraft, PHMLinear, Rule

from .tiny import family

SMALL: dict[str, Any] = {"division": 2, "reduction": 4}


def phm(in_: int, out: int, **settings: object) -> tuple[PHMLinear, torch.Tensor]:
    """A PHM layer and a C for it."""
    torch.manual_seed(0)
    method = Compacter(**settings)  # type: ignore[arg-type]
    return PHMLinear(in_, out, method), torch.randn(method.division, method.division, method.division)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("factorized", [True, False])
def test_the_matrix_is_a_sum_of_kronecker_products(rank: int, factorized: bool) -> None:
    """H = sum_j kron(C_j, L_j R_j), as a loop over torch.kron."""
    layer, c = phm(12, 8, division=4, rank=rank, factorized=factorized)
    parts = layer.left @ layer.right if factorized else layer.full
    loop = sum(torch.kron(c[j], parts[j]) for j in range(4))
    assert isinstance(loop, torch.Tensor)
    assert torch.allclose(layer.matrix(c), loop, atol=1e-6)
    x = torch.randn(5, 12)
    assert torch.allclose(layer(x, c), x @ loop + layer.bias, atol=1e-5)


def test_one_term_is_a_plain_linear_layer() -> None:
    """With n = 1 and C = 1: of rank one, or full."""
    one = torch.ones(1, 1, 1)
    factorized, _ = phm(12, 8, division=1)
    assert torch.linalg.matrix_rank(factorized.matrix(one)) == 1
    full, _ = phm(12, 8, division=1, factorized=False)
    assert torch.equal(full.matrix(one), full.full[0])


def test_the_adapter_is_written_out() -> None:
    """h + gelu(h H_1 + b_1) H_2 + b_2 around one layer of a model."""
    tuned = shake(
        pegbox.tune(family("llama"), "compacter", targets="model.layers.0.mlp.down_proj", norms=False, **SMALL)
    )
    site: Any
    (site,), c = tuned.sites.values(), tuned.trainable()["shared.c"]
    (graft,) = site.chain
    assert isinstance(graft, CompacterGraft)
    x = torch.randn(3, 48)
    h = site.original(x)
    z = F.gelu(h @ graft.down.matrix(c) + graft.down.bias, approximate="tanh")
    assert torch.allclose(site.module(x), h + z @ graft.up.matrix(c) + graft.up.bias, atol=1e-5)


def test_the_start_is_near_the_base_and_c_of_zero_is_the_base() -> None:
    want = family("llama")(**text(0)).logits
    tuned = pegbox.tune(family("llama"), "compacter", **SMALL)
    assert 0 < (tuned(**text(0)).logits - want).norm() / want.norm() < 1e-3
    with torch.no_grad():
        tuned.trainable()["shared.c"].zero_()
    assert torch.equal(tuned(**text(0)).logits, want)


def test_c_is_one_tensor() -> None:
    """In the optimizer and the state once; it moves every adapter; its gradient is the sum over all uses."""
    tuned = shake(pegbox.tune(family("t5"), "compacter", **SMALL)).eval()
    c = tuned.trainable()["shared.c"]
    grouped = [p for group in tuned.groups(1e-3) for p in group["params"]]
    assert sum(p is c for p in grouped) == 1
    assert [k for k in tuned.state() if tuned.state()[k].shape == c.shape] == ["shared.c"]
    tuned(**translation(0)).loss.backward()
    assert c.grad is not None
    whole = torch.zeros_like(c)
    for graft in tuned.adapter().grafts.values():
        if isinstance(graft, CompacterGraft):  # one use after another, on a C of its own
            own = Rule(2, 1.0)
            own.c.data.copy_(c)
            kept, graft.owner = graft.owner, (own,)
            tuned(**translation(0)).loss.backward()
            graft.owner = kept
            assert own.c.grad is not None
            whole += own.c.grad
    assert torch.allclose(whole, _gradient(tuned, c), atol=1e-5)


def _gradient(tuned: pegbox.Tuned, c: torch.Tensor) -> torch.Tensor:
    tuned.zero_grad()
    tuned(**translation(0)).loss.backward()
    assert c.grad is not None
    return c.grad


@pytest.mark.parametrize(("settings", "adapters"), [({}, 4), ({"preset": "compacter++"}, 2)])
def test_parameters_of_the_card(settings: dict[str, Any], adapters: int) -> None:
    """adapters * 3 (d + m) + n^3 + the norms: five of width 32 in this Llama."""
    tuned = pegbox.tune(family("llama"), "compacter", **settings, **SMALL)
    assert tuned.count()[0] == adapters * 3 * (32 + 8) + 2**3 + 5 * 32


def test_a_phm_adapter() -> None:
    """2 d m / n + 2 n^3 + d + m an adapter, and no shared C."""
    tuned = pegbox.tune(family("llama"), "phm", norms=False, **SMALL)
    assert tuned.count()[0] == 4 * (2 * 32 * 8 // 2 + 2 * 2**3 + 32 + 8)
    assert not any(key.startswith("shared") for key in tuned.state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"division": 3, "reduction": 4}, r"compacter\.division must divide the width 32 of .* bottleneck 8, got 3"),
        ({"division": 4, "reduction": 16}, r"compacter\.division must divide .* bottleneck 2, got 4"),
        ({"division": 1, "reduction": 64}, r"compacter\.reduction must be 1\.\.32 at .*, got 64"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pegbox.tune(family("llama"), "compacter", **settings)


def test_trained_norms_leave_the_base_its_own() -> None:
    """Norms train, as differences: disabled and detached, the base is back, bit for bit."""
    model = family("bert")
    before = bits(model)
    tuned = shake(pegbox.tune(model, "compacter", **SMALL))
    norms = [key for key in tuned.trainable() if "LayerNorm" in key]
    assert len(norms) == 2 * 5
    require_same_bits(bits(model), before, "with trained norms")
    tuned.detach()
    require_same_bits(bits(model), before, "after detach")
    assert not pegbox.tune(family("mlp"), "compacter", targets="mix", division=2, reduction=4).state().keys() & set(
        norms
    )


def test_the_file_holds_factors_biases_c_and_norms(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pegbox.tune(family("llama"), "compacter", **SMALL).save(tmp_path)
    leaves = {key.split(".", 1)[1].rpartition("proj.")[2] for key in read(tmp_path, [Compacter]).tensors}
    own = {f"{end}.{leaf}" for end in ("down", "up") for leaf in ("left", "right", "bias")}
    assert own < leaves
    assert {leaf for leaf in leaves - own if "norm" not in leaf} == {"c"}
