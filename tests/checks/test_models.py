"""The tiny models are what they say."""

from __future__ import annotations

import pytest
import torch

from pegbox.checks import FAMILIES, Family
from pegbox.checks.models import ROWS, answer, inputs
from pegbox.core.layout import is_conv1d


def build(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[name].build().eval()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_they_run_and_learn(family: Family) -> None:
    model, batch = build(family.name), family.batch(0)
    out = model(**inputs(batch))
    assert len(answer(out)) == ROWS
    family.loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters()) < 100_000


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_they_have(family: Family) -> None:
    model = build(family.name)
    assert ("bias" in family.has) == any(n.endswith("bias") for n, _ in model.named_parameters())
    assert ("token ids" in family.has) == ("input_ids" in family.batch(0))
    assert all(torch.equal(v, family.batch(0)[k]) for k, v in family.batch(0).items())
    assert any(not torch.equal(v, family.batch(1)[k]) for k, v in family.batch(0).items())


def test_the_kinds_that_methods_meet() -> None:
    llama, tied, gpt2, odd = (build(name) for name in ("llama", "tied", "gpt2", "odd"))
    attention = llama.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.weight.shape[0] == 2 * attention.k_proj.weight.shape[0]  # type: ignore[union-attr, index]
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight  # type: ignore[operator]
    assert llama.get_input_embeddings().weight is not llama.get_output_embeddings().weight  # type: ignore[operator]
    assert any(is_conv1d(m) for m in gpt2.modules())
    sides = {n for m in odd.modules() if isinstance(m, torch.nn.Linear) for n in m.weight.shape}
    assert {n for n in sides if n % 8 == 0} == set()
