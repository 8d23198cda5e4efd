"""Modules that read a child's weight and never call the child."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import shake
from pegbox.core.errors import TargetError


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class Chooser(nn.Module):
    """Uses one of two layers, and looks at the dtype of one before it calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.to(self.first.weight.dtype))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Reader())


def test_a_bypassed_site_is_refused_in_the_first_forward() -> None:
    tuned = pegbox.tune(model(), "lora", rank=2, targets=("0", "proj"))
    with pytest.raises(TargetError, match=r"1\.proj \(Linear\) was never called .* target '1\.proj\.weight'"):
        tuned(X)
    assert not any(isinstance(m._parameters, dict) and type(m._parameters) is not dict for m in tuned.modules())


@pytest.mark.parametrize("name", ["lora", "dora", "miss"])
def test_its_weight_can_be_targeted(name: str) -> None:
    tuned = shake(pegbox.tune(model(), name, rank=2, targets="1.proj.weight"))
    y = tuned(X)
    assert list(tuned.sites) == ["1.proj.weight"]
    assert not torch.allclose(y, model()(X))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trainable().values())
    torch.testing.assert_close(tuned.merge()(X), y)


def test_a_layer_that_is_not_used_is_no_bypass() -> None:
    tuned = pegbox.tune(Chooser(), "lora", rank=2, targets=("first", "second"))
    tuned(X)
    tuned(X)


def test_a_new_adapter_is_watched_again() -> None:
    tuned = pegbox.tune(model(), "lora", rank=2, targets="0", name="a")
    tuned(X)
    tuned.add("b", pegbox.method("lora", rank=2, targets="proj"))
    with pytest.raises(TargetError, match="never called"):
        tuned(X)
