from __future__ import annotations

import copy

import pytest
from torch import nn

from pegbox import anatomy
from pegbox.core.errors import TargetError

from .tiny import tiny


def test_one_file_serves_every_class_of_an_architecture() -> None:
    names = ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForQuestionAnswering")
    found = [anatomy.of(tiny("llama", name)) for name in names]
    assert [a.source for a in found] == ["llama.toml"] * 4
    assert [a.role("attn.q")[1] for a in found] == [
        "layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "transformer.layers.1.self_attn.q_proj",
    ]
    assert [a.head for a in found] == [None, "lm_head", "score", "qa_outputs"]


def test_a_wrapper_around_a_model_keeps_its_roles_by_discovery() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny("bert", "BertModel")
            self.answer = nn.Linear(32, 3)

    found = anatomy.of(Wrapped())
    assert (found.model_type, found.source, found.head) == (None, "discovered", "answer")
    inner = anatomy.of(tiny("bert", "BertModel"))
    assert found.role("attn.q") == [f"encoder.{path}" for path in inner.role("attn.q")]
    assert found.blocks == [f"encoder.{path}" for path in inner.blocks]


def test_a_known_type_in_another_layout_is_discovered() -> None:
    model = copy.deepcopy(tiny("llama", "LlamaModel"))
    model.stack = model.layers
    del model.layers
    found = anatomy.of(model)
    assert (found.model_type, found.source, found.blocks) == ("llama", "discovered", ["stack.0", "stack.1"])


def test_roles_come_in_the_order_of_the_vocabulary() -> None:
    roles = list(anatomy.of(tiny("gpt2", "GPT2LMHeadModel")).roles())
    assert roles == sorted(roles, key=list(anatomy.ROLES).index)


def test_a_prefix_names_every_role_beneath() -> None:
    found = anatomy.of(tiny("llama", "LlamaForCausalLM"))
    assert found.role("norm") == [*found.role("norm.attn"), *found.role("norm.mlp"), *found.role("norm.final")]
    assert found.role("attn") == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_unknown_role_has_a_suggestion() -> None:
    with pytest.raises(TargetError, match=r"unknown role 'atn\.q'; did you mean 'attn\.q'"):
        anatomy.of(tiny("llama", "LlamaModel")).role("atn.q")


@pytest.mark.parametrize("role", ["cross.q", "cross", "decoder", "attn.qkv"])
def test_a_role_that_the_model_lacks_lists_those_it_has(role: str) -> None:
    with pytest.raises(
        TargetError, match=rf"llama has no module with the role '{role}'; it has: embed, block, attn, attn.q"
    ):
        anatomy.of(tiny("llama", "LlamaModel")).role(role)


def test_depth_counts_blocks_from_the_input() -> None:
    found = anatomy.of(tiny("llama", "LlamaForCausalLM"))
    assert [
        found.depth(p) for p in ("model.layers.1.mlp.up_proj", "model.layers.0", "model.embed_tokens", "lm_head")
    ] == [
        1,
        0,
        None,
        None,
    ]


def test_decoder_blocks_are_deeper_than_encoder_blocks() -> None:
    found = anatomy.of(tiny("t5", "T5ForConditionalGeneration", feed_forward_proj="relu"))
    assert found.blocks == found.role("encoder.block") + found.role("decoder.block")
    assert found.depth("decoder.block.0.layer.1.EncDecAttention.q") == 2


def test_describe_has_a_line_for_each_role() -> None:
    found = anatomy.of(tiny("gpt2", "GPT2LMHeadModel"))
    title, columns, *lines = found.describe().splitlines()
    assert title == "gpt2 (gpt2.toml), 2 blocks"
    assert columns.split() == ["role", "modules", "path"]
    assert [line.split()[0] for line in lines] == list(found.roles())
    assert "attn.qkv              2  transformer.h.*.attn.c_attn" in lines
