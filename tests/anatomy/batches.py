"""Inputs for the tiny models, and one number made of what they answer.  B rows, T tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pegbox import anatomy

from .tiny import IMAGE_TOKEN

ROWS, LENGTH, PATCHES = 2, 8, 4
ANSWERS = (
    "logits",
    "start_logits",
    "end_logits",
    "logits_per_image",
    "image_embeds",
    "text_embeds",
    "reconstruction",
    "feature_maps",
    "last_hidden_state",
    "pooler_output",
)


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """What `model.forward` takes, without labels: tokens, images or spectrograms, by its signature."""
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(seed)
    config: Any = model.config
    ids = _ids(config, draw)
    batch: dict[str, Any] = {}
    if "input_features" in takes:
        batch["input_features"] = torch.randn(
            ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=draw
        )
    if "pixel_values" in takes:
        side = getattr(config, "vision_config", config).image_size
        batch["pixel_values"] = torch.randn(ROWS, 3, side, side, generator=draw)
    if "input_ids" in takes:
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = ids
    elif anatomy.of(model).found.get("cross"):  # a decoder alone
        width = config.get_text_config().hidden_size
        seen = torch.randn(ROWS, 5, width, generator=draw)
        batch |= {"encoder_outputs": (seen,)} if "encoder_outputs" in takes else {"encoder_hidden_states": seen}
    return batch


def _ids(config: Any, draw: torch.Generator) -> Tensor:
    """(B, T), an image's tokens first where the model reads images, the end of the text last."""
    ids = torch.randint(3, IMAGE_TOKEN, (ROWS, LENGTH), generator=draw)
    if getattr(config, "image_token_id", None) is not None:
        ids[:, :PATCHES] = IMAGE_TOKEN
    end = getattr(getattr(config, "text_config", config), "eos_token_id", None)
    if end is not None:
        ids[:, -1] = end
    return ids


def answers(out: Any) -> Iterator[Tensor]:
    """The tensors that a model answers with; of a model without a head, its hidden states."""
    found = [out[name] for name in ANSWERS if name in out and out[name] is not None]
    for value in found[:3]:
        yield from value if isinstance(value, tuple | list) else [value]


def number(out: Any) -> Tensor:
    """A scalar on which every answer bears: a fixed random projection, since norms leave sums of squares alone."""
    draw = torch.Generator().manual_seed(1)
    return sum(((a * torch.randn(a.shape, generator=draw)).sum() for a in answers(out)), start=torch.zeros(()))
