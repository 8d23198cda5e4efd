"""Training from scratch at 8M parameters: tokens a second of the engine's steps against what the machine multiplies.

share = 6 N tokens / (seconds * rate)        N: parameters   rate: FLOP/s of bfloat16 matrix products, alone
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

VOCABULARY = 4096
SHAPE = {"hidden": 384, "layers": 5, "heads": 6, "kv_heads": 2, "mlp": 768}  # nano-llama
LENGTH, ROWS, STEPS, WARM = 512, 16, 12, 4
TRAIN = {
    "steps": WARM + STEPS,
    "batch": ROWS,
    "warmup": 2,
    "save_steps": 10_000,
    "dtype": "bfloat16",
    "optimizer": "muon",
}
PRODUCT = (2048, 768, 768)


def measure(compile: bool) -> dict[str, Any]:
    """Tokens a second of `STEPS` steps of the whole engine, reading rows, guard and log among them, after `WARM`.

    The rate is measured before and after and averaged, so that what drifts in the machine drifts for both.
    """
    from pegbox import tune
    from pegbox.pretrain.engine import Engine, arguments, compiled
    from pegbox.pretrain.guard import Guard
    from pegbox.pretrain.model import build, parameters
    from pegbox.pretrain.settings import recipe

    with tempfile.TemporaryDirectory() as folder:
        made = recipe({"output": folder, "model": SHAPE, "rows.length": LENGTH, "train": TRAIN})
        model = build(made.model, VOCABULARY, LENGTH, 0)
        clock, guard = Clock(), Guard(made.guard, Path(folder), print)
        args = arguments(made, len(Noise()), evaluates=False)
        engine = Engine(
            tune(model, "full"), args, made, Noise(), held_out={}, tokenizer=None, guard=guard, callbacks=[clock]
        )
        before = rate()
        with compiled(model, compile):
            engine.train()
    flops = (before + rate()) / 2
    count, tokens = parameters(made.model, VOCABULARY), STEPS * ROWS * LENGTH / (clock.ends[-1] - clock.ends[WARM - 1])
    return {
        "tokens_per_second": tokens,
        "gflops": flops / 1e9,
        "parameters": count,
        "share": 6 * count * tokens / flops,
    }


def rate(seconds: float = 2.0) -> float:
    """FLOP/s of products of bfloat16 matrices."""
    m, n, k = PRODUCT
    x, w = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    for _ in range(10):
        x @ w
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        x @ w
        done += 1
    return 2 * m * n * k * done / (time.perf_counter() - start)


class Noise(Dataset[dict[str, Tensor]]):
    """Rows of random tokens."""

    def __len__(self) -> int:
        return ROWS * (WARM + STEPS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
