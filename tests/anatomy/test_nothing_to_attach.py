"""A model that a method finds nothing in is refused with what the model has and what can be done."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import pegbox
from pegbox.core.errors import TargetError


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.second(self.first(x)))
        return answer


def test_a_model_without_linears() -> None:
    model = Convolutions()
    with pytest.raises(TargetError) as refusal:
        pegbox.tune(model, "miss")
    message = str(refusal.value)
    assert "'all-linear': miss works on" in message
    assert "its parameters are in: Conv2d (2), BatchNorm2d (1)" in message
    assert "name modules in targets" in message
    assert "such as full" in message
    assert all(p.requires_grad for p in model.parameters())
    pegbox.tune(model, "full").detach()


def test_a_model_whose_only_linear_is_its_head() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match="of those this model has only 1, which all-linear leaves alone"):
        pegbox.tune(model, "lora")
    pegbox.tune(model, "lora", targets="head", rank=2).detach()


def test_a_model_without_parameters() -> None:
    with pytest.raises(TargetError, match="its parameters are in: none"):
        pegbox.tune(nn.Sequential(nn.ReLU()), "lora")
