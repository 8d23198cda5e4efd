"""What the zoo's image models are made of and measured by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo import images


def test_a_fifth_is_held_out_and_stays_so() -> None:
    captions = [f"icon {k}" for k in range(2000)]
    assert 0.18 < sum(map(images.is_held_out, captions)) / 2000 < 0.22
    assert not any(map(images.is_held_out, ("foggy", "volcano", "milky way")))
    assert all(map(images.is_held_out, ("last quarter moon face", "hot pepper", "tulip")))


def test_distance_of_two_normal_distributions() -> None:
    """Against its closed form for diagonal covariances: |difference of means|^2 + |difference of deviations|^2."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 3, generator=draw)
    b = torch.tensor([1.0, 0.0, 0.0]) + torch.tensor([1.0, 2.0, 0.5]) * torch.randn(40_000, 3, generator=draw)
    assert images.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert images.frechet_distance(a, b) == pytest.approx(1 + 1 + 0.25, abs=0.05)
    assert images.frechet_distance(a[:4, :], b[:4, :].clone()) >= 0


def test_a_set_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DATA", tmp_path)
    with pytest.raises(SystemExit, match="cifar10_small"):
        images.cifar("test")
