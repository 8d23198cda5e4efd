"""Bits per byte: against the definition, token by token, and against compressors."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain.bits import bits_per_byte, compressed
from pegbox.pretrain.settings import TokenizerSettings
from pegbox.pretrain.tokenizer import encode, train

from . import small_base
from .texts import prose

TEXTS = [*prose(6, longest=40), "short", "", "naïve – ☃", "a </s> b"]


@pytest.fixture(scope="module")
def tokenizer():
    return small_base.tokenizer()


@pytest.fixture(scope="module")
def model():
    return small_base.model().train()


class Uniform(nn.Module):
    """Any byte is as likely as any other, and no special token is."""

    def __init__(self, vocabulary: int, special: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(vocabulary))
        self.logits[:special] = -torch.inf

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


def slow(model, tokenizer, text: str, length: int, context: int) -> float:
    """Each token alone, from exactly the tokens that its window has before it."""
    ids, bits = next(encode(tokenizer, [text])), 0.0
    for at, token in enumerate(ids):
        later = max(0, at - (length - 1)) // (length - 1 - context) + (at >= length - 1)
        first = later * (length - 1 - context)
        window = torch.tensor([[0, *ids[first:at]]])
        bits -= float(model(window).logits[0, -1].log_softmax(-1)[token]) / math.log(2)
    return bits


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_it_is_what_each_token_costs_from_the_tokens_before_it(model, tokenizer, overlap: float) -> None:
    found = bits_per_byte(model, tokenizer, TEXTS, 24, batch=3, overlap=overlap)
    with torch.no_grad():
        expected = sum(slow(model, tokenizer, text, 24, math.ceil(24 * overlap)) for text in TEXTS)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert model.training


def test_batches_change_nothing(model, tokenizer) -> None:
    one = bits_per_byte(model, tokenizer, TEXTS, 16, batch=1)
    assert bits_per_byte(model, tokenizer, TEXTS, 16, batch=64).bits == pytest.approx(one.bits, rel=1e-6)


@pytest.mark.parametrize("length", [8, 64, 4096])
def test_a_uniform_model_of_bytes_needs_eight_bits(tokenizer, length: int) -> None:
    special = len(small_base.SPECIAL)
    assert bits_per_byte(Uniform(len(tokenizer), special), tokenizer, TEXTS, length).per_byte == pytest.approx(8)


def test_only_tokens_of_the_text_count_and_all_its_bytes() -> None:
    tokenizer = train(prose(40), TokenizerSettings(size=300))
    found = bits_per_byte(Uniform(300, 7), tokenizer, TEXTS, 16)
    tokens = sum(map(len, encode(tokenizer, TEXTS)))
    assert tokens < found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits == pytest.approx(tokens * math.log2(300 - 7))


def test_autocast_runs_the_model_in_bfloat16(model, tokenizer) -> None:
    full = bits_per_byte(model, tokenizer, TEXTS, 24)
    with torch.autocast("cpu", torch.bfloat16):
        half = bits_per_byte(model, tokenizer, TEXTS, 24)
    assert half.bits != full.bits
    assert half.bits == pytest.approx(full.bits, rel=0.01)


def test_what_cannot_be_measured_is_refused(model, tokenizer) -> None:
    with pytest.raises(SettingsError, match=r"overlap of 1\.0"):
        bits_per_byte(model, tokenizer, TEXTS, 16, overlap=1.0)
    for texts in ([], [""]):
        with pytest.raises(DataError, match="no byte"):
            bits_per_byte(model, tokenizer, texts, 16)
    with pytest.raises(DataError, match="empty"):
        compressed(b"text", b"", "xz")


@pytest.mark.parametrize("how", ["xz", "ppmd"])
def test_compressors_need_all_of_noise_and_little_of_what_they_have_read(how) -> None:
    noise = random.Random(0).randbytes(20_000)
    told = "\n".join(prose(300)).encode()
    new = "\n".join(prose(100, seed=1)).encode()
    assert compressed(b"", noise, how) == pytest.approx(8, rel=0.05)
    assert compressed(told, told[:4000], how) < 1
    assert compressed(told, new, how) < compressed(b"", new, how) < 4
