from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pegbox import objectives
from pegbox.core.errors import DataError

regress = objectives.get("regression")


class Line(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_mean_squared_error(shape: tuple[int, ...]) -> None:
    model = Line(shape[1] if len(shape) == 2 else 1)
    batch = {"x": torch.randn(6, 4), "labels": torch.randn(shape)}
    got = regress(model, batch)["mse"]
    torch.testing.assert_close(got, (model(batch["x"]).view(shape) - batch["labels"]).square().mean())
    parts = [{k: v[at] for k, v in batch.items()} for at in (slice(0, 4), slice(4, 6))]
    items = sum(regress.count(part) for part in parts)
    torch.testing.assert_close(sum(regress(model, part, num_items=items)["mse"] for part in parts), got)
    predictions = regress.predict(model, batch)
    assert regress.measure(predictions)["mse"] == pytest.approx(got.item())


def test_labels_never_broadcast() -> None:
    batch = {"x": torch.randn(6, 4), "labels": torch.randn(6)}
    with pytest.raises(DataError, match=r"labels \(6,\) do not fit the model's \(6, 3\)"):
        regress(Line(3), batch)
