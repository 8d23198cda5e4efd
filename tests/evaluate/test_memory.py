from __future__ import annotations

import sys

import pytest
import torch

from pegbox.evaluate import memory

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_a_peak_is_seen_and_forgotten() -> None:
    memory.forget_peak()
    before = memory.peak()
    assert before is not None
    held = torch.ones(64 * MB // 4)
    del held
    high = memory.peak()
    assert high is not None
    assert 48 * MB < high - before < 128 * MB
    memory.forget_peak()
    after = memory.peak()
    assert after is not None
    assert after < high - 32 * MB
