"""MiSS: the invariants of its card."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.checks.models import text
from pegbox.core.errors import SettingsError
from pegbox.methods.miss import MiSS, MiSSGraft

from .tiny import family, linear, on_linear

OUT, IN = 12, 20


def put(rank: int, mini: int | None = None) -> tuple[MiSSGraft, Tensor, torch.nn.Module]:
    tuned, graft, w = on_linear(MiSS(rank=rank, mini=mini, targets=".*"), OUT, IN)
    assert isinstance(graft, MiSSGraft)
    return graft, w, tuned


@pytest.mark.parametrize("rank", [1, 4, 5, 6, 7, 20])
def test_the_change_is_d_tiled(rank: int) -> None:
    """dW[:, c] = D[c mod r, :], the last tile truncated where r does not divide `in`; y = x (W + dW)^T."""
    graft, w, tuned = put(rank)
    tiled = torch.stack([graft.d[c % rank] for c in range(IN)], dim=1)  # (out, in)
    assert torch.allclose(graft.weight(w) - w, tiled, atol=1e-6)
    x = torch.randn(3, IN)
    assert torch.allclose(tuned(x), x @ (w + tiled).T, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 6, 7])
def test_columns_at_distance_r_are_equal_and_the_rank_is_at_most_r(rank: int) -> None:
    graft, w, _ = put(rank)
    change = (graft.weight(w) - w).detach()
    assert torch.allclose(change[:, rank:], change[:, : IN - rank], atol=1e-6)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) <= rank


@pytest.mark.parametrize("mini", [1, 3, 4])
def test_mini_repeats_along_the_outputs(mini: int) -> None:
    """dW[p, c] = D[c mod r, p mod mini]."""
    graft, w, _ = put(4, mini)
    change = graft.weight(w) - w
    want = torch.stack([torch.stack([graft.d[c % 4, p % mini] for c in range(IN)]) for p in range(OUT)])
    assert torch.allclose(change, want, atol=1e-6)


def test_mini_of_all_outputs_is_miss() -> None:
    plain, w, _ = put(4)
    full, _, _ = put(4, OUT)
    assert torch.equal(plain.d, full.d)
    assert torch.equal(plain.weight(w), full.weight(w))


@pytest.mark.parametrize(("method", "size"), [(MiSS(rank=4), 4 * OUT), (MiSS(rank=4, mini=3), 4 * 3)])
def test_parameters(method: MiSS, size: int) -> None:
    tuned = pegbox.tune(linear(OUT, IN), dataclasses.replace(method, targets=".*"))
    assert tuned.count()[0] == size


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": 33}, r"rank must be 1\.\.32 at .* got 33"), ({"rank": 4, "mini": 5}, "mini must divide the 32 outputs")],
)
def test_clean_failures(settings: dict[str, int], words: str) -> None:
    model = family("llama")
    with pytest.raises(SettingsError, match=words):
        pegbox.tune(model, "miss", **settings)
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_the_mean_of_two_adapters_changes_by_the_mean_of_their_changes() -> None:
    """Federated averaging is exact, as the change is linear in D."""
    tuned = pegbox.tune(family("llama"), "miss", rank=5, name="a")
    from pegbox.checks.lab import shake

    shake(tuned, 1)
    shake(tuned.add("b", MiSS(rank=5)), 2)
    half = tuned.use(pegbox.Sum(a=0.5, b=0.5))(**text(0)).logits
    mean = pegbox.tune(family("llama"), "miss", rank=5)
    mean.load_state({k: (v + tuned.state("b")[k]) / 2 for k, v in tuned.state("a").items()})
    assert torch.allclose(mean(**text(0)).logits, half, atol=1e-5)


@pytest.mark.parametrize("mini", [None, 4])
def test_pefts_settings_are_read_and_written(mini: int | None) -> None:
    method = MiSS(rank=8, mini=mini)
    config = method.peft_extra(family("llama")) | {"r": 8}
    assert config["init_weights"] == ("mini" if mini else True)
    assert MiSS.from_peft(config) == ({"mini": 4} if mini else {})


def test_dropout_drops_inputs_before_shards_are_summed() -> None:
    """As the authors do: with p = 1/2 some outputs see half a shard."""
    tuned, graft, w = on_linear(MiSS(rank=4, targets=".*", dropout=0.5), OUT, IN)
    torch.manual_seed(0)
    change = tuned.train()(torch.ones(1, IN)) - w.sum(1)
    assert isinstance(graft, MiSSGraft)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(torch.ones(1, IN), 0.5)
    assert torch.allclose(change, dropped.unflatten(-1, (-1, 4)).sum(-2) @ graft.d, atol=1e-5)
