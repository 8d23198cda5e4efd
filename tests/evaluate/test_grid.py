from __future__ import annotations

import itertools
import math

import pytest

from pegbox import methods
from pegbox.evaluate.grid import centre, edge, rates


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_rates_are_even_on_a_log_scale_around_the_middle(count: int) -> None:
    found = rates(1e-3, count)
    assert len(found) == count
    assert math.exp(sum(map(math.log, found)) / count) == pytest.approx(1e-3, rel=0.02)
    steps = [b / a for a, b in itertools.pairwise(found)]
    assert all(step == pytest.approx(10**0.5, rel=0.03) for step in steps)


def test_training_the_base_takes_lower_rates() -> None:
    centres = {name: centre(cls) for name, cls in methods.catalogue().items()}
    assert min(centres, key=centres.__getitem__) == "full"


def test_edges() -> None:
    tried = [1.0, 2.0, 3.0]
    assert [edge(rate, tried) for rate in tried] == ["lowest", None, "highest"]
    assert edge(1.0, [1.0]) is None
