"""A hierarchical backbone with a stream of features for each of four tasks: MTLoRA beside LoRA, which has one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import SwinConfig, SwinModel

import pegbox
from benchmarks.models import DTYPES
from pegbox.methods.mtlora import features

SIDE, ROWS = 224, 4
TASKS = ("semseg", "normals", "sal", "human_parts")
SETTINGS: dict[str, dict[str, Any]] = {
    "mtlora": {"tasks": TASKS, "rank": 16, "task_rank": 4, "downsample": "lora"},
    "lora": {"rank": 20, "alpha": 80.0},  # as many trained numbers
}


def measure(method: str, dtype: str, steps: int) -> dict[str, Any]:
    """Median seconds of `steps` optimizer steps after one to warm up.

    Of MTLoRA also `alone`: of what its mathematics makes once more for each task, forward and backward, all but the
    tasks' own thin products.

    Args:
        method: a key of SETTINGS.
    """
    torch.manual_seed(0)
    config = SwinConfig(image_size=SIDE)  # Swin-T
    model = SwinModel(config, add_pooling_layer=False).to(DTYPES[dtype]).train()
    tuned = pegbox.tune(model, method, **SETTINGS[method])
    x = torch.randn(ROWS, 3, SIDE, SIDE, dtype=DTYPES[dtype])
    optimizer = torch.optim.AdamW(tuned.groups(1e-4))

    def step() -> None:
        if method == "mtlora":
            stages = [stage for of_task in features(tuned, x).values() for stage in of_task]
        else:
            stages = tuned(x, output_hidden_states=True).reshaped_hidden_states[1:]
        torch.stack([stage.float().square().mean() for stage in stages]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"step": median_seconds(step, steps), "trained": tuned.count()[0]}
    if method == "mtlora":
        found["alone"] = len(TASKS) * sum(_alone(config, k, DTYPES[dtype]) for k in range(len(config.depths)))
    return found


def median_seconds(call: Callable[[], None], steps: int) -> float:
    """Of all calls but the first."""
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _alone(config: SwinConfig, stage: int, dtype: torch.dtype) -> float:
    """Seconds of one stream in the last block of a stage, its norm, activation and residual sums, and downsampled."""
    tokens, width = (SIDE // config.patch_size // 2**stage) ** 2, config.embed_dim * 2**stage
    x, h = (torch.randn(ROWS, tokens, wide, dtype=dtype, requires_grad=True) for wide in (width, 4 * width))
    reduction = torch.randn(2 * width, 4 * width, dtype=dtype)

    def call() -> None:
        made = [F.layer_norm(x + x, (width,)) + x, F.gelu(h)]
        if stage + 1 < len(config.depths):
            made.append(F.linear(F.layer_norm(made[0].view(ROWS, -1, 4 * width), (4 * width,)), reduction))
        torch.autograd.backward(made, [torch.ones_like(y) for y in made])

    return median_seconds(call, 5)
