"""Text generation with an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from pegbox.checks.check import check
from pegbox.checks.lab import Lab, require_equal
from pegbox.checks.models import LENGTH, PAD
from pegbox.checks.when import generates
from pegbox.core.tuned import Tuned

NEW = 6  # tokens to write


@check(generates, on="all")
def a_cache_changes_nothing(lab: Lab) -> None:
    """Greedy generation with the cache gives the tokens that it gives without."""
    tuned = lab.shaken()
    batch = lab.inputs()
    with_cache = _generate(tuned, batch["input_ids"], batch["attention_mask"], use_cache=True)
    without = _generate(tuned, batch["input_ids"], batch["attention_mask"], use_cache=False)
    require_equal(with_cache, without, "tokens written with the cache")
    require_equal(with_cache[:, :-1], _by_hand(lab, tuned)[:, : with_cache.shape[1] - 1], "tokens written by generate")


@check(generates, on="all")
def padding_changes_nothing(lab: Lab) -> None:
    """Rows padded on the left, generated together, get the tokens that each gets alone."""
    tuned = lab.shaken()
    ids = lab.inputs()["input_ids"]
    lengths = [LENGTH - 2 * row for row in range(len(ids))]
    padded, mask = torch.full_like(ids, PAD), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, LENGTH - length :], mask[row, LENGTH - length :] = ids[row, :length], 1
    together = _generate(tuned, padded, mask)
    for row, length in enumerate(lengths):
        alone = _generate(tuned, ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
        require_equal(together[row, -NEW:], alone[0, -NEW:], f"tokens of row {row}, {LENGTH - length} padded,")


@torch.no_grad()
def _generate(tuned: Tuned, ids: Tensor, mask: Tensor, *, use_cache: bool = True) -> Tensor:
    tokens: Tensor = tuned.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=use_cache
    )
    return tokens


@torch.no_grad()
def _by_hand(lab: Lab, tuned: Tuned) -> Tensor:
    """The likeliest next token, one whole forward each."""
    batch = lab.inputs()
    writes = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    tokens = batch[writes] if writes == "input_ids" else torch.full((len(batch["input_ids"]), 1), PAD)
    for _ in range(NEW):
        given = batch | {writes: tokens}
        if writes == "input_ids":
            given["attention_mask"] = torch.ones_like(tokens)
        tokens = torch.cat([tokens, tuned(**given).logits[:, -1:].argmax(-1)], dim=1)
    return tokens
