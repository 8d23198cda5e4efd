"""The context: what a caller hands to grafts beside the model's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox.core import Base, Graft, Method, Site, Traits
from pegbox.core.errors import MethodError


class AddGraft(Graft):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + self.scale * base.site.context.read("bonus", 0.0, like=y)


@dataclass(frozen=True, kw_only=True)
class Add(Method):
    traits: ClassVar[Traits] = Traits(seams=("output",), merge="no")
    reads: ClassVar[tuple[str, ...]] = ("bonus",)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        return AddGraft()


def tuned_and_base() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Identity())
    x = torch.randn(4, 2)
    want = model(x).detach()
    return pegbox.tune(model, Add(targets="0")), x, want


def test_grafts_read_what_is_given_and_nothing_outlives_the_block() -> None:
    tuned, x, want = tuned_and_base()
    with tuned.given(bonus=2.0):
        assert torch.allclose(tuned(x), want + 2)
        with tuned.given(bonus=3.0):
            assert torch.allclose(tuned(x), want + 3)
        assert torch.allclose(tuned(x), want + 2)
    assert torch.allclose(tuned(x), want)
    with pytest.raises(ZeroDivisionError), tuned.given(bonus=2.0):
        raise ZeroDivisionError
    assert torch.allclose(tuned(x), want)


def test_tensors_come_in_the_dtype_of_the_computation() -> None:
    tuned, x, _ = tuned_and_base()
    with tuned.given(bonus=torch.ones(4, 3, dtype=torch.float64)):
        assert tuned(x).dtype == torch.float32


def test_a_name_that_nobody_reads_is_refused() -> None:
    tuned, _, _ = tuned_and_base()
    with pytest.raises(MethodError, match=r"'bonos'.*did you mean 'bonus'"), tuned.given(bonos=1.0):
        pass


def test_rows_get_their_own_part() -> None:
    tuned, x, want = tuned_and_base()
    tuned.add("other", Add(targets="0"))
    bonus = torch.arange(4.0)[:, None]
    with tuned.rows(["default", None, "other", "default"]), tuned.given(bonus=bonus):
        assert torch.allclose(tuned(x), want + bonus * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None])
