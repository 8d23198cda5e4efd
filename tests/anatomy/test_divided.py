"""Fused matrices and experts: each part of a matrix is what its architecture computes with under that name."""

from __future__ import annotations

import pytest
import torch

import pegbox
from pegbox import anatomy
from pegbox.core.errors import TargetError

from .batches import inputs
from .tiny import tiny

FUSED = [
    ("phi3", "Phi3ForCausalLM", "model.layers.0.self_attn.qkv_proj", {"q": 32, "k": 16, "v": 16}),
    ("phi3", "Phi3ForCausalLM", "model.layers.1.mlp.gate_up_proj", {"gate": 48, "up": 48}),
    ("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.query_key_value", {"q": 32, "k": 32, "v": 32}),
    ("deberta", "DebertaForMaskedLM", "deberta.encoder.layer.0.attention.self.in_proj", {"q": 32, "k": 32, "v": 32}),
    ("mixtral", "MixtralForCausalLM", "model.layers.0.mlp.experts.gate_up_proj", {"gate": 48, "up": 48}),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "model.layers.0.mlp.experts.gate_up_proj", {"gate": 24, "up": 24}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "model.layers.1.mlp.experts.gate_up_proj", {"gate": 24, "up": 24}),
]


QKV = [("phi3", "Phi3ForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"), ("deberta", "DebertaForMaskedLM")]


@pytest.mark.parametrize(("kind", "name", "path", "sizes"), FUSED)
def test_parts_share_out_all_rows(kind: str, name: str, path: str, sizes: dict[str, int]) -> None:
    parts = anatomy.of(tiny(kind, name)).parts(path)
    assert {part: sum(map(len, rows)) for part, rows in parts.items()} == sizes
    rows = sorted(row for ranges in parts.values() for r in ranges for row in r)
    assert rows == list(range(sum(sizes.values())))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("phi3", "Phi3ForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"), ("deberta", "DebertaForMaskedLM")],
)
def test_without_values_attention_gives_nothing(kind: str, name: str) -> None:
    """Rows named `v` set to 0, and so are their biases: the attention's own output is 0, whatever q and k are."""
    model = tiny(kind, name)
    found = anatomy.of(model)
    path = found.role("attn.qkv")[0]
    qkv, out = model.get_submodule(path), model.get_submodule(found.role("attn.out")[0])
    rows = [row for r in found.parts(path)["v"] for row in r]
    seen: list[torch.Tensor] = []
    hook = out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kept = {n: p.detach().clone() for n, p in qkv.named_parameters()}
    try:
        with torch.no_grad():
            for p in qkv.parameters():
                p[rows] = 0
            model(**inputs(model))
    finally:
        hook.remove()
        with torch.no_grad():
            for n, p in qkv.named_parameters():
                p.copy_(kept[n])
    assert not seen[0].any()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("phi3", "Phi3ForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"), ("deberta", "DebertaForMaskedLM")],
)
def test_queries_and_values_are_tuned_apart(kind: str, name: str) -> None:
    model = tiny(kind, name)
    tuned = pegbox.tune(model, "lora", rank=2, targets=("attn.q", "attn.v"))
    try:
        ends = {key.partition("[")[2][:2] for key in tuned.trainable()}
        assert ends == {"q]", "v]"}
    finally:
        tuned.detach()


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "MixtralForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM")])
def test_experts_are_tuned_each(kind: str, name: str) -> None:
    model = tiny(kind, name)
    tuned = pegbox.tune(model, "lora", rank=2, targets="mlp.down")
    try:
        experts = {key.rpartition(".")[0] for key in tuned.trainable()}
        assert experts == {f"graft.model.layers.{b}.mlp.experts.down_proj[{e}]" for b in (0, 1) for e in range(4)}
    finally:
        tuned.detach()


def test_all_linear_leaves_experts_and_routers_alone() -> None:
    linears = anatomy.of(tiny("qwen2_moe", "Qwen2MoeForCausalLM")).resolve("all-linear", parts=True)
    assert {path.partition("mlp.")[2] or "attention" for path in linears} == {
        "attention",
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    }


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "MixtralForCausalLM"), ("qwen2_moe", "Qwen2MoeForCausalLM")])
def test_experts_are_not_left_out_in_silence(kind: str, name: str) -> None:
    """An adapter on outputs has none of an expert's; with the shared expert alone it would be another method."""
    with pytest.raises(TargetError, match=r"mlp\.experts\.down_proj, and series works on whole modules"):
        pegbox.tune(tiny(kind, name), "series", bottleneck=2)
    pegbox.tune(tiny(kind, name), "series", bottleneck=2, targets="attn.out").detach()
