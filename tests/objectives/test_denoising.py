"""Denoising: noise, targets and weights against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import objectives
from pegbox.core.errors import DataError, SettingsError
from pegbox.objectives.denoising import Denoising, alphas, denoising, noised, row_errors, velocity, weights

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'pegbox[diffusion]'")

SETTINGS = [
    {},
    {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction": "v_prediction"},
    {"steps": 50},
]


def scheduler(settings: Denoising) -> Any:
    return diffusers.DDPMScheduler(
        num_train_timesteps=settings.steps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        beta_schedule=settings.schedule,
        prediction_type=settings.prediction,
        clip_sample=False,
    )


def images(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, 3, 8, 8, generator=draw),
        "noise": torch.randn(4, 3, 8, 8, generator=draw),
        "timesteps": torch.randint(50, (4,), generator=draw),
    }


class Recorder(nn.Module):
    """Answers with a constant, and keeps what it was called with."""

    def __init__(self, said: Tensor) -> None:
        super().__init__()
        self.said, self.calls = said, []

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Any) -> tuple[Tensor]:
        self.calls.append((x, timestep, conditions))
        return (self.said,)


@pytest.mark.parametrize("given", SETTINGS)
def test_noise_and_targets_are_those_of_the_scheduler(given: dict[str, Any]) -> None:
    settings = Denoising(**given)
    theirs, batch = scheduler(settings), images()
    assert torch.allclose(alphas(settings), theirs.alphas_cumprod)
    alpha = alphas(settings)[batch["timesteps"]]
    x, noise, t = batch["latents"], batch["noise"], batch["timesteps"]
    assert torch.allclose(noised(x, noise, alpha), theirs.add_noise(x, noise, t), atol=1e-6)
    assert torch.allclose(velocity(x, noise, alpha), theirs.get_velocity(x, noise, t), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_answer_gives_the_image_back(prediction: str) -> None:
    """The scheduler, told y, finds x_0: the target means what it means there."""
    settings = Denoising(prediction=prediction)
    theirs, batch = scheduler(settings), images()
    alpha = alphas(settings)[batch["timesteps"]]
    y = batch["noise"] if prediction == "epsilon" else velocity(batch["latents"], batch["noise"], alpha)
    model = Recorder(y)
    assert denoising(model, batch, settings=settings)["mse"] == 0
    for row, t in enumerate(batch["timesteps"]):
        x_t = model.calls[0][0][row : row + 1]
        step = theirs.step(y[row : row + 1], int(t), x_t, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(step.pred_original_sample, batch["latents"][row : row + 1], atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_error_of_the_image(prediction: str) -> None:
    """min(snr, gamma) on the error of x_0, whichever the model predicts: that is what the paper's weights come from."""
    alpha = torch.tensor([0.9999, 0.9, 0.5, 0.1, 0.001], dtype=torch.float64)
    snr = alpha / (1 - alpha)
    x0_error = torch.ones_like(alpha)
    per_error = {"epsilon": snr, "v_prediction": snr + 1}[prediction]  # |y - y'|^2 = per_error |x_0 - x_0'|^2
    have = weights(alpha, prediction, 5.0) * per_error * x0_error
    assert torch.allclose(have, snr.clamp(max=5.0))
    assert torch.equal(weights(alpha, prediction, None), torch.ones_like(alpha))


def test_the_loss_is_a_mean_over_rows() -> None:
    batch = images()
    model = Recorder(torch.zeros(4, 3, 8, 8))
    settings = Denoising(min_snr=5.0)
    rows = batch["noise"].square().mean((1, 2, 3)) * weights(alphas(settings)[batch["timesteps"]], "epsilon", 5.0)
    assert torch.allclose(denoising(model, batch, settings=settings)["mse"], rows.mean())
    assert torch.allclose(denoising(model, batch, settings=settings, num_items=8.0)["mse"], rows.sum() / 8)
    assert torch.allclose(row_errors(model, batch, settings, None), rows)


def test_learned_variances_are_left_alone() -> None:
    batch = images()
    both = torch.cat([batch["noise"], torch.full_like(batch["noise"], 7.0)], dim=1)
    assert denoising(Recorder(both), batch)["mse"] == 0


def test_conditions_go_to_the_model_and_draws_follow_their_seed() -> None:
    model = Recorder(torch.zeros(4, 3, 8, 8))
    batch = {"pixel_values": images()["latents"], "class_labels": torch.arange(4)}
    for seed in (0, 0, 1):
        denoising(model, batch, generator=torch.Generator().manual_seed(seed))
    (x, t, conditions), (again, _, _), (other, _, _) = model.calls
    assert torch.equal(conditions["class_labels"], torch.arange(4))
    assert conditions.keys() == {"class_labels"}
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert t.shape == (4,)
    assert int(t.max()) < 1000


def test_a_real_denoiser_learns() -> None:
    torch.manual_seed(0)
    model = pegbox.checks.FAMILIES["unet"].build()
    tuned = pegbox.tune(model, "lora", rank=4)
    batch = {**images(), "encoder_hidden_states": torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1))}
    objective = objectives.get("diffusion").given({"min_snr": 5.0})
    optimizer = torch.optim.AdamW(tuned.groups(1e-2))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(tuned, batch)["mse"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    measured = objective.measure(objective.predict(tuned, batch))
    assert measured == objective.measure(objective.predict(tuned, batch))
    assert measured["mse"] > 0


def test_mistakes() -> None:
    with pytest.raises(DataError, match="latents"):
        denoising(Recorder(torch.zeros(1)), {"images": torch.zeros(1)})
    with pytest.raises(DataError, match="same shape"):
        denoising(Recorder(torch.zeros(4, 5, 8, 8)), images())
    with pytest.raises(SettingsError, match="prediction"):
        objectives.get("denoising").given({"prediction": "noise"})
