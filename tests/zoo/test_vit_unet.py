"""The image models that ship: their processors, what they know, and what they were trained with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler
from transformers import AutoImageProcessor

from pegbox import zoo
from zoo import unet, vit

GARMENTS = ("Trouser", "Bag", "Ankle boot", "Dress")


@pytest.fixture(scope="module")
def judge() -> Any:
    return zoo.load("nano-vit", dtype=torch.float32)


@pytest.mark.parametrize(("name", "most"), [("nano-vit", 2_400_000), ("nano-unet", 2_600_000)])
def test_it_is_as_small_as_said(name: str, most: int) -> None:
    assert zoo.entry(name).bytes <= most
    assert {p.dtype for p in zoo.load(name).parameters()} == {torch.bfloat16}


def test_an_image_of_any_size_is_classified(judge: Any) -> None:
    processor = AutoImageProcessor.from_pretrained(zoo.folder("nano-vit"), backend="pil")
    batch = processor([PIL.Image.new("RGB", (105, 60), "white")], return_tensors="pt")
    with torch.no_grad():
        logits = judge(**batch).logits
    assert logits.shape == (1, len(judge.config.id2label)) == (1, 130)


def test_samples_are_known_for_what_was_asked(judge: Any) -> None:
    """Both models as shipped, with the scheduler beside the weights, in fewer steps than usual."""
    model, steps = zoo.load("nano-unet", dtype=torch.float32), DDIMScheduler.from_pretrained(zoo.folder("nano-unet"))
    assert steps.config.prediction_type == unet.OBJECTIVE["prediction"]
    labels = torch.tensor([unet.CLASSES.index(name) for name in GARMENTS]).repeat(3)
    made = unet.Rows(unet.sampled(model, labels, steps=10, seed=1), labels)
    assert unet.known(judge, unet.judged(judge, made)[1], labels, unet.images.GARMENTS) >= 75


def test_pictures_are_altered_in_range_and_by_the_seed() -> None:
    content = torch.randint(256, (6, 3, vit.DRAWN, vit.DRAWN)).to(torch.uint8)
    kinds = torch.arange(6) % 3
    data = vit.Augmented(content, torch.arange(6), light=kinds == 0, icon=kinds == 1, glyph=kinds == 2)
    torch.manual_seed(0)
    batch, other = data([5, 1, 2, 2]), data([5, 1, 2, 2])
    torch.manual_seed(0)
    assert data([5, 1, 2, 2])["pixel_values"].equal(batch["pixel_values"])
    assert not other["pixel_values"].equal(batch["pixel_values"])
    assert batch["labels"].tolist() == [5, 1, 2, 2]
    assert batch["pixel_values"].shape == (4, 3, vit.SIDE, vit.SIDE)
    assert batch["pixel_values"].abs().max() <= 1


def test_an_average_goes_on_where_it_was_saved(tmp_path: Any) -> None:
    model = torch.nn.Linear(2, 2)
    whole = unet.Averaged(model, tmp_path)
    halves = [unet.Averaged(model, tmp_path)]
    for step in range(1, 7):
        torch.nn.init.normal_(model.weight)
        state, control = SimpleNamespace(global_step=step), SimpleNamespace(should_save=step == 3)
        for average in (whole, halves[-1]):
            average.on_step_end(None, state, control)
        if step == 3:
            halves.append(unet.Averaged(model, tmp_path))
            halves[-1].on_train_begin(None, state, control)
    torch.testing.assert_close(halves[-1].weights, whole.weights, rtol=0, atol=0)
    assert not whole.weights["weight"].equal(model.weight)
