"""A hierarchical backbone with a stream of features for each of four tasks: MTLoRA beside LoRA, which has one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig, SwinModel

import pegbox
from benchmarks.measure import median_seconds
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

    Of MTLoRA also `alone`: of what its mathematics makes for each task beside the shared stream, forward and backward.

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
        found["alone"] = sum(_alone(config, stage, DTYPES[dtype]) for stage in range(len(config.depths)))
    return found


def _alone(config: SwinConfig, stage: int, dtype: torch.dtype) -> float:
    """Seconds of the tasks' streams in the last block of a stage and downsampled after it, the base's products given.

    Plain operations on what the shared stream hands over, without a block around them that knows of one stream only.
    """
    width, tokens = config.embed_dim * 2**stage, ROWS * (SIDE // config.patch_size // 2**stage) ** 2
    tasks, rank = len(TASKS), SETTINGS["mtlora"]["task_rank"]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    x, attended, out, up, down = (drawn(tokens, width * n) for n in (1, 1, 1, 4, 1))
    factors = [(drawn(tasks, i * width, rank), drawn(tasks, rank, o * width)) for i, o in ((1, 1), (1, 4), (4, 1))]
    reduction = torch.randn(2 * width, 4 * width, dtype=dtype)

    def with_own(base: Tensor, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.baddbmm(base.expand(tasks, -1, -1), torch.bmm(x, pair[0]), pair[1])

    def call() -> None:
        h = x + with_own(out, attended.expand(tasks, -1, -1), factors[0])
        inner = F.gelu(with_own(up, F.layer_norm(h, (width,)), factors[1]))
        y = h + with_own(down, inner, factors[2])
        if stage + 1 < len(config.depths):
            y = F.linear(F.layer_norm(y.reshape(tasks, -1, 4 * width), (4 * width,)), reduction)
        y.backward(torch.ones_like(y))

    return median_seconds(call, 5)
