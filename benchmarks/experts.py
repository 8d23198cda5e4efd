"""Routed experts at one linear layer: one gated product for all of them, beside a loop over experts.

Eight LoRAs of rank 8 and the two that a router gives each token, forward and backward, gradients for the router, the
input and, where they train, the factors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import median_seconds
from benchmarks.models import DTYPES

EXPERTS, RANK, CHOSEN = 8, 8, 2
WIDTH, TOKENS = 1024, 4096


def measure(how: str, train: str, dtype: str, steps: int) -> dict[str, Any]:
    """Median seconds of a forward and backward, and what is above those of the layer without experts.

    Args:
        how: `product`, Pegbox's MeteoRA, or `loop`.
        train: `gates`, or `all`.
        dtype: of layer and tokens, a key of DTYPES; experts and router are float32.
    """
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False).to(DTYPES[dtype])
    x = torch.randn(1, TOKENS, WIDTH, dtype=DTYPES[dtype], requires_grad=True)
    bare = _median(layer, x, steps)
    step = _median({"product": _product, "loop": _loop}[how](layer, train), x, steps)
    return {"step": step, "bare": bare, "above": step - bare}


def _median(call: Any, x: Tensor, steps: int) -> float:
    gradient = torch.randn_like(x)
    return median_seconds(lambda: call(x).backward(gradient), steps)


def _product(layer: nn.Linear, train: str) -> Any:
    import pegbox

    ranks = (RANK,) * EXPERTS
    return pegbox.tune(nn.Sequential(layer), "meteora", targets="0", ranks=ranks, top_k=CHOSEN, train=train).train()


def _loop(layer: nn.Linear, train: str) -> Any:
    """The tokens of each expert taken out, multiplied, and added back."""
    router = nn.Parameter(torch.randn(EXPERTS, WIDTH) * WIDTH**-0.5)
    a = [nn.Parameter(torch.randn(RANK, WIDTH) * WIDTH**-0.5) for _ in range(EXPERTS)]
    b = [nn.Parameter(torch.zeros(WIDTH, RANK)) for _ in range(EXPERTS)]
    for factor in (*a, *b):
        factor.requires_grad_(train == "all")

    def call(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = layer(rows)
        values, places = (rows @ router.T.to(x.dtype)).float().topk(CHOSEN, dim=-1)
        weights = values.softmax(-1).to(x.dtype)
        for expert in range(EXPERTS):
            token, rank = (places == expert).nonzero(as_tuple=True)
            made = F.linear(F.linear(rows[token], a[expert].to(x.dtype)), b[expert].to(x.dtype))
            y = y.index_add(0, token, weights[token, rank, None] * made)
        return y.view(x.shape)

    return call
