"""What nano-clip is made of, and the model that ships."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.images import Picture

from zoo import clip, images

WORDS = ("tulip", "rose", "hot", "pepper", "clock", "arrow", "leaf", "button")
CAPTIONS = ("rose", "red clock", "leaf")


class Teacher:
    """Random embeddings, the same for the same text."""

    tokenizer = SimpleNamespace(get_vocab=lambda: dict.fromkeys((*WORDS, "##x", "12")))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        draws = [torch.Generator().manual_seed(sum(text.encode())) for text in texts]
        return F.normalize(torch.stack([torch.randn(8, generator=draw) for draw in draws]), dim=-1)


def test_held_out_captions_are_no_lesson(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [Picture(PIL.Image.new("RGB", (1, 1)), name) for name in ("tulip", "Hot Pepper")]
    known = [Picture(PIL.Image.new("RGB", (1, 1)), name) for name in (*CAPTIONS, "clock")]  # "clock": validation
    monkeypatch.setattr(images, "emoji", lambda *, held_out, label: held if held_out else known)
    monkeypatch.setattr(clip, "Teacher", Teacher)
    monkeypatch.setattr(clip, "PHRASES", 200)
    lesson = clip.lessons(CAPTIONS, width=2)
    assert not {"tulip", "hot pepper", "clock"} & set(lesson.texts)
    assert {"rose", "arrow"} < set(lesson.texts)
    assert set(lesson.words) == set(WORDS)
    assert lesson.targets.shape == (len(lesson.texts) + len(CAPTIONS), 2)
    assert lesson.texts == clip.lessons(CAPTIONS, width=2).texts


def test_a_text_means_the_same_beside_longer_ones() -> None:
    tokenizer = clip.tokenizer_of(CAPTIONS, WORDS)
    assert (
        tokenizer.decode(tokenizer("Red CLOCK “サ”")["input_ids"], skip_special_tokens=True).strip() == "red clock “サ”"
    )
    model = clip.network(len(tokenizer), seed=0).eval()
    with torch.no_grad():
        alone, beside = (
            model.get_text_features(input_ids=clip.ids(tokenizer, texts)).pooler_output[0]
            for texts in (["leaf"], ["leaf", "leaf leaf leaf rose"])
        )
    torch.testing.assert_close(alone, beside)


def test_recall_counts_both_directions() -> None:
    """A model that tells every second pair gives as much."""
    embedded = torch.eye(8)
    swapped = embedded.clone()
    swapped[[0, 1, 2, 3]] = embedded[[1, 0, 3, 2]]
    found = clip.recalls(embedded, swapped)
    assert found["recall_at_1"]["mean"] == 0.5
    assert found["recall_at_1"]["chance"] == 1 / 8
    assert found["recall_at_1"]["half"] > 0.1


@pytest.fixture
def squares() -> Tensor:
    """Three dark squares on white, the last one red."""
    pixels = torch.full((3, 3, clip.SIDE, clip.SIDE), 255, dtype=torch.uint8)
    pixels[:, :, 24:40, 24:40] = 0
    pixels[2, 0, 24:40, 24:40] = 220
    return pixels


def test_pictures_are_others_each_time_and_stay_on_white(squares: Tensor) -> None:
    torch.manual_seed(0)
    x = squares / 255
    first, second = clip.mild(x), clip.mild(x)
    assert not first.equal(second)
    assert first[:, :, 0, 0].min() > 0.7
    assert first.amin((1, 2, 3)).max() < 0.3
    assert clip.wild(x).shape == x.shape


def test_looks_tell_colour_and_place_and_what_they_guess_is_what_they_know(squares: Tensor) -> None:
    x = squares / 255
    x[1] = x[1].roll(20, 1)
    whole, quarters, *_ = clip._measures(x)
    torch.testing.assert_close(whole.square().sum(1), torch.ones(3))
    torch.testing.assert_close(quarters.square().sum(1), torch.full((3,), 4.0))
    looks = clip.Looks(torch.cat([clip.mild(x) for _ in range(40)]), seed=0)(x)
    assert torch.pdist(looks).min() > 0.5
    known = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert F.cosine_similarity(clip.Guess(looks, known)(looks), known).min() > 0.8
    assert clip.Guess(looks, known)(looks + 100).norm() < 0.01


def test_half_of_a_batch_has_captions(squares: Tensor) -> None:
    torch.manual_seed(0)
    looks = clip.Looks(torch.cat([clip.mild(squares / 255) for _ in range(40)]), seed=0)
    guess = clip.Guess(looks(squares / 255), torch.eye(3))
    shown = torch.tensor([[5, 1, 0], [6, 1, 0], [7, 8, 1]])
    batch = clip.Pairs(squares, shown, looks, guess)([0, 1, 2, 2])
    assert batch["input_ids"].tolist() == [[5, 1], [6, 1]]
    assert {key: len(value) for key, value in batch.items() if key != "input_ids"} == dict.fromkeys(
        ("pixel_values", "looks", "guesses"), 4
    )
