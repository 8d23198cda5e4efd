from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pegbox.objectives import metrics


def test_accuracy() -> None:
    assert metrics.accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75
    assert metrics.accuracy(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [1, 0]])) == 0.5
    assert math.isnan(metrics.accuracy(torch.tensor([]), torch.tensor([])))


def test_macro_f1_by_hand() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 1, 4]), torch.tensor([0, 1, 1, 1, 0])
    by_class = [2 * 1 / (2 + 1 + 1), 2 * 2 / (4 + 0 + 1), 0.0]  # 0, 1 and 4; 2 and 3 do not occur
    assert metrics.macro_f1(predicted, labels) == pytest.approx(sum(by_class) / 3)
    assert math.isnan(metrics.macro_f1(torch.tensor([]).long(), torch.tensor([]).long()))


def test_macro_f1_of_sets_and_of_classes_agree() -> None:
    labels, predicted = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 1, 1, 2])
    sets = [torch.nn.functional.one_hot(x, 3) for x in (predicted, labels)]
    assert metrics.macro_f1(*sets) == metrics.macro_f1(predicted, labels)


def test_correlations() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert metrics.pearson(x, 3 * x - 7) == pytest.approx(1.0)
    assert metrics.pearson(x, -x) == pytest.approx(-1.0)
    assert metrics.spearman(x, x.exp()) == pytest.approx(1.0)
    y = torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert metrics.pearson(x, y) == pytest.approx(0.8)
    assert metrics.pearson(torch.stack([x, x], 1), torch.stack([y, -x], 1)) == pytest.approx((0.8 - 1.0) / 2)
    both = torch.stack([x, y], 1)
    assert metrics.spearman(both, both) == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [torch.full((7,), 0.1), torch.zeros(7)])
def test_correlation_with_a_constant_is_nan(constant: Tensor) -> None:
    assert math.isnan(metrics.pearson(torch.arange(7.0), constant))
    assert math.isnan(metrics.spearman(constant, torch.arange(7.0)))


def test_equal_values_share_their_mean_rank() -> None:
    assert metrics.ranks(torch.tensor([10.0, 20.0, 10.0, 30.0, 10.0])).tolist() == [2.0, 4.0, 2.0, 5.0, 2.0]


def test_errors_and_perplexity() -> None:
    assert metrics.mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 2.0
    assert metrics.nll(torch.tensor([6.0, 2.0]), torch.tensor([3, 1])) == 2.0
    assert math.isnan(metrics.nll(torch.tensor([0.0]), torch.tensor([0])))
    assert metrics.perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert metrics.perplexity(1e4) == math.inf
