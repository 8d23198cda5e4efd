"""A base that learns to count within seconds, from rows in which some batches may be noise."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pegbox.pretrain.engine import Fitted, fit
from pegbox.pretrain.model import build
from pegbox.pretrain.settings import Recipe, recipe

from .small_base import tokenizer

LENGTH, ROWS = 24, 4  # of a row; of an iteration
MODEL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48}
TOKENIZER = tokenizer()
ZERO = TOKENIZER.convert_tokens_to_ids("0")
HELD_OUT = {"digits": ["0123456789", "34567890"], "words": ["the house"]}


class Counting(Dataset[dict[str, Tensor]]):
    """Row i counts on from a digit that i decides; those of noisy batches are drawn at random.

    Args:
        noisy: numbers of batches.
        left_out: numbers of batches that are not there, as if they had been skipped.
    """

    def __init__(self, noisy: Collection[int] = (), left_out: Collection[int] = ()) -> None:
        self.noisy, self.left_out = frozenset(noisy), sorted(left_out)

    def __len__(self) -> int:
        return 40 * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, row = divmod(index, ROWS)
        for gone in self.left_out:
            batch += gone <= batch
        draw = torch.Generator().manual_seed(batch * ROWS + row)
        if batch in self.noisy:
            ids = torch.randint(256, (LENGTH,), generator=draw)
        else:
            ids = ZERO + (torch.randint(10, (1,), generator=draw) + torch.arange(LENGTH)) % 10
        ids[0] = 0
        return {"input_ids": ids, "labels": ids.clone()}


def settings(output: Path | str, **changes: Any) -> Recipe:
    plain: dict[str, Any] = {"output": str(output), "rows.length": LENGTH, "model": MODEL, "seed": 3}
    plain |= {"train.steps": 40, "train.batch": ROWS, "train.learning_rate": 5e-3, "train.dtype": "float32"}
    plain |= {"train.logging_steps": 1, "train.save_steps": 10, "train.eval_steps": 20, "train.keep": 9}
    plain |= {"guard.window": 8, "guard.snapshot": 8, "guard.skip": 3, "guard.norm": 30}  # steep at first
    return recipe(plain | changes)


def run(made: Recipe, data: Dataset[dict[str, Tensor]], say: Any = print, **more: Any) -> Fitted:
    model = build(made.model, len(TOKENIZER), LENGTH, made.seed)
    return fit(made, model, TOKENIZER, data, **{"held_out": HELD_OUT, "say": say} | more)


def same(one: Fitted, other: Fitted) -> bool:
    """To the bit."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
