"""Routed experts at one linear layer: one gated product for all of them, beside a loop over experts.

Eight LoRAs of rank 8 and the two that a router gives each token, forward and backward, gradients for factors, router
and input.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS, RANK, CHOSEN = 8, 8, 2
WIDTH, TOKENS = 1024, 4096


def measure(how: str, steps: int) -> dict[str, Any]:
    """Median seconds of a forward and backward.

    Args:
        how: `product`, Pegbox's MeteoRA, or `loop`.
    """
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    call = _product(layer) if how == "product" else _loop(layer)
    seconds = [_timed(lambda: call(x).square().mean().backward()) for _ in range(steps + 1)]
    return {"step": statistics.median(seconds[1:]), "steps": seconds[1:]}


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _product(layer: nn.Linear) -> Any:
    import pegbox

    ranks = (RANK,) * EXPERTS
    return pegbox.tune(nn.Sequential(layer), "meteora", targets="0", ranks=ranks, top_k=CHOSEN, train="all").train()


def _loop(layer: nn.Linear) -> Any:
    """The tokens of each expert taken out, multiplied, and added back."""
    layer.requires_grad_(False)
    router = nn.Parameter(torch.randn(EXPERTS, WIDTH) * WIDTH**-0.5)
    a = [nn.Parameter(torch.randn(RANK, WIDTH) * WIDTH**-0.5) for _ in range(EXPERTS)]
    b = [nn.Parameter(torch.zeros(WIDTH, RANK)) for _ in range(EXPERTS)]

    def call(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = layer(rows)
        values, places = (rows @ router.T).topk(CHOSEN, dim=-1)
        weights = values.softmax(-1)
        for expert in range(EXPERTS):
            token, rank = (places == expert).nonzero(as_tuple=True)
            made = F.linear(F.linear(rows[token], a[expert]), b[expert])
            y = y.index_add(0, token, weights[token, rank, None] * made)
        return y.view(x.shape)

    return call
