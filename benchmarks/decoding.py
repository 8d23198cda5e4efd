"""Eight adapters on one base, one token a row: all rows in one batch, or one adapter after the other."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import ALPHA, RANK, batch, llama

ADAPTERS = 8
PROMPT, TOKENS = 64, 32


def measure(how: str, dtype: str) -> dict[str, Any]:
    """Tokens a second over all rows, without the prompts' forward, and each row's first token, the same either way.

    Args:
        how: `mixed`, a batch of eight rows with `tuned.rows`; or `switched`, each row to its end after `tuned.use`,
            which is once an adapter, not once a token.
    """
    tuned = _tuned(dtype)
    prompts = batch(ADAPTERS, PROMPT)["input_ids"]
    run = {"mixed": _mixed, "switched": _switched}[how]
    run(tuned, prompts, 2)  # to warm up
    seconds, tokens = run(tuned, prompts, TOKENS)
    return {"tokens_per_second": ADAPTERS * TOKENS / seconds, "first_tokens": tokens[:, 0].tolist()}


def _tuned(dtype: str) -> Any:
    import pegbox
    from pegbox.methods import make

    tuned = pegbox.tune(llama(dtype), "lora", rank=RANK, alpha=ALPHA, name="0").eval()
    for i in range(1, ADAPTERS):
        tuned.add(str(i), make("lora", {"rank": RANK, "alpha": ALPHA}), seed=i)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(ADAPTERS):
            for value in tuned.state(str(i)).values():
                value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return tuned


def _mixed(tuned: Any, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
    with tuned.rows([str(i) for i in range(ADAPTERS)]):
        return _decode(tuned, prompts, tokens)


def _switched(tuned: Any, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
    total, rows = 0.0, []
    for i in range(ADAPTERS):
        start = time.perf_counter()
        tuned.use(str(i))
        total += time.perf_counter() - start
        seconds, row = _decode(tuned, prompts[i : i + 1], tokens)
        total += seconds
        rows.append(row)
    return total, torch.cat(rows)


@torch.no_grad()
def _decode(tuned: Any, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
    """Greedy: (rows, T) -> seconds of `tokens` steps with a KV cache, and what they gave (rows, tokens)."""
    out = tuned(input_ids=prompts, use_cache=True, logits_to_keep=1)
    last, made = out.logits[:, -1].argmax(-1, keepdim=True), []
    start = time.perf_counter()
    for _ in range(tokens):
        out = tuned(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(last)
    return time.perf_counter() - start, torch.cat(made, dim=1)
