"""AdaptFormer by its paper: the branch, the scale, where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import classified_text, images
from pegbox.core.errors import SettingsError, TargetError

from .tiny import family


def test_the_equation_beside_a_whole_mlp() -> None:
    """y = MLP(x) + 0.1 (U ReLU(D x + d) + u)."""
    tuned = shake(pegbox.tune(family("vit"), "adaptformer", bottleneck=4)).eval()
    site: Any = next(iter(tuned.sites.values()))
    p = dict(site.chain[0].named_parameters())
    x = torch.randn(2, 5, 32)
    branch = F.linear(F.relu(F.linear(x, p["down"], p["down_bias"])), p["up"], p["up_bias"])
    assert torch.allclose(site.module(x), site.original(x) + 0.1 * branch, atol=1e-6)


def test_it_stands_beside_every_mlp() -> None:
    """2 b d + b + d a block; the base's outputs at the start."""
    tuned = pegbox.tune(family("vit"), "adaptformer", bottleneck=4)
    assert sorted(tuned.sites) == [f"vit.layers.{i}.mlp" for i in range(2)]
    assert tuned.count()[0] == 2 * (2 * 4 * 32 + 4 + 32)
    assert torch.equal(tuned(**images(0)).logits, family("vit")(**images(0)).logits)


def test_defaults_of_the_paper() -> None:
    made: Any = pegbox.method("adaptformer")
    assert (made.bottleneck, made.scale, made.bias, made.dropout, made.start) == (64, 0.1, True, 0.0, "zero")
    assert pegbox.method("adaptformer", preset="official").dropout == 0.1  # type: ignore[attr-defined]


def test_dropout_is_inside_the_bottleneck() -> None:
    """After the activation, as in the authors' code: with all dropped, the second bias is left."""
    tuned = shake(pegbox.tune(family("vit"), "adaptformer", bottleneck=4, dropout=0.999999)).train()
    site: Any = next(iter(tuned.sites.values()))
    p = dict(site.chain[0].named_parameters())
    x = torch.randn(2, 5, 32)
    assert torch.allclose(site.module(x), site.original(x) + 0.1 * p["up_bias"], atol=1e-6)


@pytest.mark.parametrize("targets", ["mlp", ("mlp",)])
def test_an_mlp_that_is_no_module(targets: str | tuple[str, ...]) -> None:
    """BERT's: the branch reads what the first projection reads, and adds to what the last one gives."""
    tuned = shake(pegbox.tune(family("bert"), "adaptformer", bottleneck=4, targets=targets)).eval()
    seen: dict[str, torch.Tensor] = {}
    first: Any
    last: Any
    first, last = (
        tuned.sites["bert.encoder.layer.0.intermediate.dense"],
        tuned.sites["bert.encoder.layer.0.output.dense"],
    )
    first.module.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    last.module.register_forward_hook(lambda m, args, out: seen.update(z=args[0], y=out))
    tuned(**classified_text(0))
    p = dict(last.chain[0].named_parameters())
    branch = F.linear(F.relu(F.linear(seen["x"], p["down"], p["down_bias"])), p["up"], p["up_bias"])
    assert torch.allclose(seen["y"], last.original(seen["z"]) + 0.1 * branch, atol=1e-6)
    assert not tuned.adapter().shared.by_block  # type: ignore[union-attr]  # nothing is kept after the forward
    assert tuned.count()[0] == 2 * (2 * 4 * 32 + 4 + 32)


def test_what_has_no_mlp_is_refused() -> None:
    with pytest.raises(TargetError, match="mlp"):
        pegbox.tune(family("mlp"), "adaptformer")
    with pytest.raises(SettingsError, match="has none"):
        pegbox.tune(family("vit"), "adaptformer", targets="layernorm_before")
