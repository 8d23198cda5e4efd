"""Denoising: Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e         e ~ N(0, 1), a_t = prod_{s <= t} (1 - beta_s), t uniform
    mse = mean_rows w_t mean |f(x_t, t) - y|^2    y = e, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0
    w_t = 1, or min(snr_t, gamma) / snr_t for e and min(snr_t, gamma) / (snr_t + 1) for v, snr_t = a_t / (1 - a_t)

v is of Salimans & Ho (2022), arXiv:2202.00512; the weights are those of min-SNR (Hang et al., 2023), arXiv:2303.09556.
The model is a denoiser of diffusers or one that is called like it: `f(x_t, timestep=t, **conditions).sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.core.errors import DataError
from pegbox.core.settings import setting
from pegbox.objectives.batch import field
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions, Settings

CLEAN = ("latents", "pixel_values")  # keys of x_0, of which a batch has one
DRAWN = ("noise", "timesteps")  # keys of e and t, drawn where a batch lacks them
PREDICT_SEED = 0  # so that two measurements of one model see the same noise


@dataclass(frozen=True, kw_only=True)
class Denoising(Settings):
    """What the noise is like, and what the model says of it; those of the model's own pre-training."""

    prediction: Literal["epsilon", "v_prediction"] = setting("epsilon", "what the model predicts: the noise, or v")
    min_snr: float | None = setting(None, "gamma of min-SNR weights, 5 in the paper; unweighted if none", above=0)
    steps: int = setting(1000, "steps of the diffusion", at_least=1)
    schedule: Literal["linear", "scaled_linear"] = setting("linear", "how beta grows; its root where scaled")
    beta_start: float = setting(0.0001, "beta of the first step; 0.00085 in Stable Diffusion", above=0, below=1)
    beta_end: float = setting(0.02, "beta of the last; 0.012 in Stable Diffusion", above=0, below=1)


def denoising(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: Tensor | float | None = None,
    settings: Denoising = Denoising(),
    generator: torch.Generator | None = None,
) -> Losses:
    """Weighted mean squared error of what a denoiser says.

    Args:
        model: a denoiser, as it is or wrapped
        batch: `latents` or `pixel_values` (B, C, H, W); `class_labels` (B,), `encoder_hidden_states` (B, S, d) and what
            else the model takes; what an adapter reads from the context, `hint` say; and, where they should not be
            drawn, `noise` (B, C, H, W) and `timesteps` (B,)
        num_items: what the sum over rows is divided by, see `count`; the batch's own count if None
        settings: see `Denoising`
        generator: of the draws; torch's global one if None

    Returns:
        `mse`.

    Raises:
        DataError: no images in the batch, or a model that answers in another shape.
    """
    total = row_errors(model, batch, settings, generator).sum()
    return {"mse": total / (count(batch) if num_items is None else num_items)}


def count(batch: Batch, **_: Any) -> Tensor:
    """Rows: what a mean divides by."""
    x = _clean(batch)
    return torch.tensor(float(len(x)), device=x.device)


def row_errors(model: nn.Module, batch: Batch, settings: Denoising, generator: torch.Generator | None) -> Tensor:
    """The weighted error of each row, (B,), in float32."""
    x = _clean(batch)
    noise = batch.get("noise")
    noise = _normal(x, generator) if noise is None else noise
    t = batch.get("timesteps")
    t = torch.randint(settings.steps, (len(x),), generator=generator).to(x.device) if t is None else t
    alpha = alphas(settings).to(x.device)[t]  # (B,)
    said = _said(model, batch, noised(x, noise, alpha), t)
    y = noise if settings.prediction == "epsilon" else velocity(x, noise, alpha)
    if said.shape[1] == 2 * x.shape[1]:  # variances follow, which other losses train
        said = said[:, : x.shape[1]]
    if said.shape != y.shape:
        raise DataError(f"the model answers {tuple(said.shape)} to images of {tuple(x.shape)}; expected the same shape")
    errors = (said.float() - y.float()).square().flatten(1).mean(1)
    return errors * weights(alpha, settings.prediction, settings.min_snr)


def alphas(settings: Denoising) -> Tensor:
    """a_t of every step, (steps,)."""
    power = 2.0 if settings.schedule == "scaled_linear" else 1.0
    first, last = settings.beta_start ** (1 / power), settings.beta_end ** (1 / power)
    betas = torch.linspace(first, last, settings.steps, dtype=torch.float32) ** power
    return (1.0 - betas).cumprod(0)


def noised(x: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t from x_0 and e (B, C, H, W) and a_t (B,)."""
    signal, level = _roots(alpha, x)
    return signal * x + level * noise


def velocity(x: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """v from x_0 and e (B, C, H, W) and a_t (B,)."""
    signal, level = _roots(alpha, x)
    return signal * noise - level * x


def weights(alpha: Tensor, prediction: str, gamma: float | None) -> Tensor:
    """w_t from a_t (B,)."""
    if gamma is None:
        return torch.ones_like(alpha)
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / (snr + (prediction == "v_prediction"))


def _roots(alpha: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    shaped = alpha.view(-1, *[1] * (like.ndim - 1))
    return shaped.sqrt().to(like.dtype), (1 - shaped).sqrt().to(like.dtype)


def _clean(batch: Batch) -> Tensor:
    return field(batch, next((key for key in CLEAN if key in batch), CLEAN[0]), "denoising")


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the processor, so that one seed gives one noise wherever the model is."""
    return torch.randn(x.shape, generator=generator).to(x)


def _said(model: nn.Module, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
    """The model's answer (B, C, H, W), or (B, 2 C, H, W) of one that learns variances."""
    conditions = {k: v for k, v in batch.items() if k not in (*CLEAN, *DRAWN)}
    out = model(x, timestep=t, **conditions)  # a tuned model takes what its adapters read
    answer: Tensor = out if isinstance(out, Tensor) else out[0]
    return answer


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, settings: Denoising = Denoising()) -> Predictions:
    """`errors` (B,), from noise that is the same whenever asked for."""
    return {"errors": row_errors(model, batch, settings, torch.Generator().manual_seed(PREDICT_SEED))}


def measure(predictions: Predictions, *, settings: Denoising = Denoising()) -> dict[str, float]:
    """`mse`."""
    return {"mse": predictions["errors"].mean().item()}


OBJECTIVE = Objective(
    "denoising", denoising, count, predict, measure, best="mse", higher_is_better=False, settings=Denoising
)
