"""Bits per byte: what a model, or a compressor, needs for a text, whatever its tokens are.

    bits per byte = sum_t -log2 p(token_t | tokens before t) / bytes of the text in UTF-8

Perplexity compares models of one tokenizer; this compares any two, and either with xz or PPMd.
"""

from __future__ import annotations

import functools
import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pegbox.core.errors import DataError, MissingExtra, SettingsError
from pegbox.core.headless import evaluating
from pegbox.objectives.causal_lm import IGNORED, predict
from pegbox.pretrain.tokenizer import encode, ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POOL = 64  # batches whose windows are sorted by length together
PPMD_ORDER, PPMD_MEMORY = 8, 1 << 30  # symbols of context; bytes

Window = tuple[list[int], int]  # tokens, and how many of the first are only context


@dataclass(frozen=True)
class Bits:
    """What a model needs for some texts."""

    bits: float
    bytes: int

    @property
    def per_byte(self) -> float:
        return self.bits / self.bytes


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    length: int,
    *,
    batch: int = 16,
    overlap: float = 0.5,
) -> Bits:
    """Bits that a causal language model needs for texts, each on its own.

    A text is read in windows of at most `length` tokens, each with `<s>` in front, as rows have it in training.  A
    token that is not in a text's first window has at least `overlap * length` of the text's tokens before it.  Special
    tokens are never predicted, so they are in neither sum.  Under `torch.autocast` the model runs in that dtype; losses
    are summed in float32.

    Args:
        model: on any device, in any dtype; runs without dropout and is left in its mode.
        batch: windows of one forward; they are padded on the right, where a causal model does not look.

    Raises:
        SettingsError: `overlap` leaves no token to predict.
        DataError: the texts hold no byte.
    """
    context = math.ceil(overlap * length)
    if not 0 <= context < length - 1:
        raise SettingsError(
            f"an overlap of {overlap} leaves no token of {length} to predict; give 0 to below 1, say 0.5"
        )
    start, _ = ends(tokenizer)
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in texts:
            size += len(text.encode())
            yield text

    windows = (window for ids in encode(tokenizer, counted()) for window in _windows(ids, start, length, context))
    nats = 0.0
    with evaluating(model):
        while pool := sorted(islice(windows, batch * POOL), key=lambda window: len(window[0])):
            nats += sum(_nats(model, pool[at : at + batch]) for at in range(0, len(pool), batch))
    if not size:
        raise DataError("no byte to predict: there are no texts, or all are empty")
    return Bits(nats / math.log(2), size)


def compressed(train: bytes, text: bytes, how: Literal["xz", "ppmd"]) -> float:
    """Bits per byte of `text` for a compressor that has read `train`: size(train + text) - size(train), in bits.

    Args:
        how: xz at preset 9, which looks 64 MiB back; or PPMd (variant H) of order 8 with 1 GiB.

    Raises:
        DataError: `text` is empty.
        MissingExtra: PPMd without pyppmd.
    """
    if not text:
        raise DataError("no byte to compress: the text is empty")
    size = _xz if how == "xz" else _ppmd
    return 8 * (size(train + text) - _alone(train, how)) / len(text)


def _windows(ids: list[int], start: int, length: int, context: int) -> Iterator[Window]:
    """Windows of a text, which predict each token once."""
    known = 0  # tokens that earlier windows predicted
    while known < len(ids):
        before = min(known, context)
        end = known - before + length - 1
        yield [start, *ids[known - before : end]], before + 1
        known = end


@torch.no_grad()
def _nats(model: nn.Module, windows: list[Window]) -> float:
    """What all predicted tokens of windows need."""
    longest = max(len(ids) for ids, _ in windows)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    inputs = torch.tensor([ids + [ids[0]] * (longest - len(ids)) for ids, _ in windows], device=device)  # (B, T)
    at = torch.arange(longest, device=device)
    first, end = torch.tensor([[before, len(ids)] for ids, before in windows], device=device).T[..., None]
    labels = inputs.masked_fill((at < first) | (at >= end), IGNORED)
    return float(predict(model, {"input_ids": inputs, "labels": labels})["nll"].sum())


@functools.lru_cache(maxsize=2)  # one training text is read before several others
def _alone(train: bytes, how: str) -> int:
    return _xz(train) if how == "xz" else _ppmd(train)


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def _ppmd(data: bytes) -> int:
    try:
        import pyppmd
    except ImportError as error:
        raise MissingExtra("pyppmd", "dev", "compressing by PPMd") from error
    encoder = pyppmd.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY)
    return len(encoder.encode(data)) + len(encoder.flush())
