"""EVA's search for directions, beside the forward passes over the batches that it looks at.

all-MiniLM-L6-v2 on sentences of banking77, every linear layer, ranks found among twice as many.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCHES, ROWS, RANK = 16, 32, 16
Batch = dict[str, Tensor]


def measure() -> dict[str, Any]:
    """Seconds of the search, of plain forwards over as many batches, and how many batches those are."""
    import pegbox
    from pegbox.train import Callback

    model, batches = _encoder()
    _forward(model, batches)  # what is allocated once, is
    seen = _Seen(batches)
    tuned = pegbox.tune(model, "eva", rank=RANK, start_settings={"batches": BATCHES})
    start = time.perf_counter()
    Callback(tuned).calibrate(seen)
    search = time.perf_counter() - start
    tuned.detach()
    forward = _forward(model, batches[: seen.asked])
    return {"search": search, "forward": forward, "batches": seen.asked, "forwards": search / forward}


class _Seen(list[Batch]):
    """Batches that count how many were asked for."""

    asked = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.asked += 1
            yield batch


def _encoder() -> tuple[nn.Module, list[Batch]]:
    from transformers import AutoModel, AutoTokenizer

    from pegbox.recipes import shipped
    from pegbox.train.model import locate

    place = locate("minilm")
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    with gzip.open(shipped.data("banking77") / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, BATCHES * ROWS)]
    parts = (texts[k : k + ROWS] for k in range(0, len(texts), ROWS))
    return model, [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def _forward(model: nn.Module, batches: list[Batch]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - start
