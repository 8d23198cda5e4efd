"""Folding an adapter into the base, and taking it out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, bits, require_close, require_equal, require_near, require_raises, require_same_bits
from pegbox.checks.when import cannot_merge, keeps_base, maps_weights, merges
from pegbox.core.errors import CannotMerge, MethodError


@check(merges, on="all")
def merged_equals_forward(lab: Lab) -> None:
    """The merged base, without grafts, gives the adapter's outputs (float32: 1e-5)."""
    tuned = lab.shaken()
    want = lab.output(tuned)
    merged = tuned.merge()
    patched = [path for path, m in merged.named_modules() if "forward" in m.__dict__]
    require(not patched, f"a graft is left on {patched[:1]}")
    require_close(lab.output(merged), want, "the merged model")


@check(merges, keeps_base)
def merged_equals_forward_in_bf16(lab: Lab) -> None:
    """On a bfloat16 base, before and after merging, outputs are those of float32 arithmetic (1e-2 of their norm)."""
    want = lab.output(lab.shaken(lab.model().bfloat16().float(), size=0.05))
    tuned = lab.shaken(lab.model().bfloat16(), size=0.05)
    require_near(lab.output(tuned), want, "the adapter on a bfloat16 base")
    merged = tuned.merge()
    kinds = {p.dtype for p in merged.parameters()}
    require(kinds == {torch.bfloat16}, f"merged weights are {kinds}")
    require_near(lab.output(merged), want, "the merged model")


@check(cannot_merge)
def merging_is_refused(lab: Lab) -> None:
    """As traits.merge is 'no', `merge` is a CannotMerge, and nothing has changed after it."""
    tuned = lab.shaken()
    want, before = lab.output(tuned), bits(tuned.model)
    with require_raises(CannotMerge, "merge()"):
        tuned.merge()
    require_same_bits(bits(tuned.model), before, "after a refused merge")
    require_equal(lab.output(tuned), want, "the model after a refused merge")


@check(merges, on="all")
def unmerge_restores_bits(lab: Lab) -> None:
    """After `unmerge` base, outputs and configuration are what they were before `merge`; it can be merged again."""
    tuned = lab.shaken()
    want, before, config = lab.output(tuned), bits(tuned.model), _config(tuned.model)
    pointers = {n: p.data_ptr() for n, p in tuned.model.named_parameters(remove_duplicate=False)}
    for _ in range(2):
        tuned.merge()
        tuned.unmerge()
    require_same_bits(bits(tuned.model), before, "after unmerge")
    again = {n: p.data_ptr() for n, p in tuned.model.named_parameters(remove_duplicate=False)}
    require(again == pointers, "tensors are copies of those from before, or no longer tied")
    require(_config(tuned.model) == config, "the configuration is another one after unmerge")
    require_equal(lab.output(tuned), want, "the model after unmerge")


@check(merges, keeps_base)
def detach_after_merge_gives_the_base_back(lab: Lab) -> None:
    """`detach` after `merge` gives the base of before the merge; merging twice is refused."""
    model = lab.model()
    want, before = lab.output(model), bits(model)
    tuned = lab.shaken(model)
    tuned.merge()
    with require_raises(MethodError, "merging twice"):
        tuned.merge()
    require_same_bits(bits(tuned.detach()), before, "detached after a merge")
    require_equal(lab.output(model), want, "the model detached after a merge")


@check(merges, keeps_base, maps_weights, on="tied")
def merging_a_tied_head_leaves_the_embedding(lab: Lab) -> None:
    """Where head and embedding are one tensor, merging into the head leaves the embedding as it was."""
    tuned = lab.shaken(method=lab.with_setting(targets="head"))
    want = lab.output(tuned)
    before = tuned.get_input_embeddings().weight.detach().clone()
    merged = tuned.merge()
    require_equal(merged.get_input_embeddings().weight, before, "the embedding")  # type: ignore[operator]
    require(not torch.equal(merged.get_output_embeddings().weight, before), "the head did not move")  # type: ignore[operator]
    require_close(lab.output(merged), want, "the merged model")
    tied = merged.config.tie_word_embeddings  # type: ignore[union-attr]
    require(tied is False, "the configuration says that head and embedding are tied")


def _config(model: nn.Module) -> object:
    config: Any = getattr(model, "config", None)
    if config is None or isinstance(config, Mapping):  # diffusers' is one
        return copy.deepcopy(config)
    return copy.deepcopy(config.to_dict())
