"""Optimizer steps of a denoiser: the same U-Net, images and noise, with one method or another."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

import pegbox
from benchmarks import memory
from benchmarks.models import DTYPES
from pegbox import objectives

SIZE, CHANNELS, TEXT = 32, 4, 256  # of a latent, and the width of a text's vectors
ROWS, TOKENS = 8, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "scedit": {},
    "lora": {"targets": ("attn", "cross"), "rank": 64, "alpha": 64.0},  # as in SCEdit's comparison
}


def measure(method: str, dtype: str, steps: int) -> dict[str, Any]:
    """Seconds of `steps` optimizer steps after one to warm up, and the peak memory until then.

    Args:
        method: a key of SETTINGS.
    """
    model = unet(dtype).train()
    before = memory.resident()
    memory.forget_peak()
    tuned = pegbox.tune(model, method, **SETTINGS[method])
    objective, data = objectives.get("denoising"), batch(DTYPES[dtype])
    optimizer = torch.optim.AdamW(tuned.groups(1e-4))

    def step() -> float:
        start = time.perf_counter()
        loss = objective(tuned, data)["mse"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    seconds = [step() for _ in range(steps)]
    peak = memory.peak()
    with torch.no_grad(), tuned.disabled():
        first = objective(tuned, data)["mse"].item()
    return {
        "step": statistics.median(seconds),
        "steps": seconds,
        "peak": peak,
        "above_model": peak - before,
        "first_loss": first,
        "trained": tuned.count()[0],
    }


def unet(dtype: str) -> Any:
    """Three sizes of 128, 256 and 384 channels, two layers each; the same weights every time: 50M parameters."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(128, 256, 384),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    ).to(DTYPES[dtype])


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random latents, text, noise and steps, the same every time."""
    draw = torch.Generator().manual_seed(1)
    images = {name: torch.randn(ROWS, CHANNELS, SIZE, SIZE, generator=draw).to(dtype) for name in ("latents", "noise")}
    text = torch.randn(ROWS, TOKENS, TEXT, generator=draw).to(dtype)
    return {**images, "encoder_hidden_states": text, "timesteps": torch.randint(1000, (ROWS,), generator=draw)}
