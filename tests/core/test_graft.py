"""Grafts that map several parameters of a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import Stack, Sum
from pegbox.core import Method, Site, Traits, WeightGraft
from pegbox.core.graft import Graft


class ScaleAll(WeightGraft):
    """W' = diag(l) W and b' = l b, as IA3 on outputs."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.rand(site.shape[0]) + 0.5)
        self.maps = ("weight", "bias") if site.has("bias") else ("weight",)

    def weight(self, w: Tensor) -> Tensor:
        return self.l[:, None] * w

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        return self.weight(w) if parameter == "weight" else self.l * w


@dataclass(frozen=True, kw_only=True)
class Scaling(Method):
    traits: ClassVar[Traits] = Traits(seams=("weight",), identity=False, linear=True)

    def graft(self, site: Site, shared: nn.Module | None) -> ScaleAll:
        return ScaleAll(site)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Linear(6, 3))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def scaled(model: nn.Module, x: Tensor, by: dict[str, Tensor]) -> Tensor:
    """The outputs of every linear times its vector."""
    for name, layer in model.named_children():
        x = layer(x) * by.get(name, torch.ones(1))
    return x


def test_a_class_maps_its_parameter() -> None:
    class OfBias(WeightGraft):
        maps = ("bias",)

        def weight(self, w: Tensor) -> Tensor:
            return w

    assert (Graft.maps, WeightGraft.maps, OfBias.maps) == ((), ("weight",), ("bias",))


def test_weight_and_bias_change_together(model: nn.Sequential) -> None:
    tuned = pegbox.tune(model, Scaling(targets=("0", "2", "3")))
    by = {path: site.chain[0].l for path, site in tuned.sites.items()}
    with tuned.disabled():
        want = scaled(model, X, by)
    torch.testing.assert_close(tuned(X), want)
    torch.testing.assert_close(tuned.merge()(X), want)
    tuned.unmerge()
    torch.testing.assert_close(tuned(X), want)


def test_stacked_with_one_that_maps_the_bias_alone(model: nn.Sequential) -> None:
    for order in (("scale", "bias"), ("bias", "scale")):
        tuned = pegbox.tune(model, Scaling(targets=("0", "2", "3")), name="scale")
        tuned.add("bias", pegbox.method("bitfit"))
        with torch.no_grad():
            for p in tuned.adapter("bias").parameters():
                p.normal_()
        tuned.use(Stack(*order))
        want = tuned(X)
        torch.testing.assert_close(tuned.merge()(X), want)
        tuned.detach()


def test_a_sum_with_one_that_maps_the_bias_alone(model: nn.Sequential) -> None:
    tuned = pegbox.tune(model, Scaling(targets=("0", "2", "3")), name="scale")
    tuned.add("bias", pegbox.method("bitfit"))
    with torch.no_grad():
        for p in tuned.adapter("bias").parameters():
            p.normal_()
    merged = {}
    base = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("scale", "bias"):
        merged[name] = {k: v.clone() for k, v in tuned.use(name).merge().state_dict().items()}
        tuned.unmerge()
    have = tuned.use(Sum(scale=0.5, bias=2.0)).merge().state_dict()
    for key, value in base.items():
        want = value + 0.5 * (merged["scale"][key] - value) + 2.0 * (merged["bias"][key] - value)
        torch.testing.assert_close(have[key], want)
