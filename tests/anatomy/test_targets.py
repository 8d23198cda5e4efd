from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from pegbox.anatomy import of
from pegbox.core.errors import TargetError

from .tiny import tiny

ANY = (nn.Module,)


def resolved(model: nn.Module, targets: Any, **given: Any) -> list[str]:
    return of(model).resolve(targets, **given)


@pytest.fixture
def llama() -> nn.Module:
    return tiny("llama", "LlamaForCausalLM")


@pytest.fixture
def gpt2() -> nn.Module:
    return tiny("gpt2", "GPT2LMHeadModel")


@pytest.fixture
def t5() -> nn.Module:
    return tiny("t5", "T5ForConditionalGeneration", feed_forward_proj="relu")


@pytest.fixture
def bert() -> nn.Module:
    return tiny("bert", "BertForSequenceClassification")


def refusal(model: nn.Module, targets: Any, **given: Any) -> str:
    with pytest.raises(TargetError) as caught:
        resolved(model, targets, **given)
    return str(caught.value)


def test_all_linear_leaves_the_head(llama: nn.Module) -> None:
    paths = resolved(llama, "all-linear")
    assert len(paths) == 14
    assert "lm_head" not in paths
    assert paths == resolved(llama, "all") == resolved(llama, ("attn", "mlp"))


def test_all_linear_leaves_every_part_of_a_head() -> None:
    model = tiny("roberta", "RobertaForSequenceClassification")
    assert not [path for path in resolved(model, "all-linear") if path.startswith("classifier")]


def test_all_linear_is_no_embedding_convolution_or_norm() -> None:
    model = tiny("vit", "ViTForImageClassification")
    assert resolved(model, "all-linear", kinds=(nn.Linear, nn.Embedding, nn.Conv2d)) == resolved(model, "all-linear")
    assert resolved(model, "all-linear", kinds=ANY) == resolved(model, "all-linear")


def test_role(gpt2: nn.Module) -> None:
    assert resolved(gpt2, "attn.qkv") == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def test_prefix_names_the_matrices_beneath(llama: nn.Module) -> None:
    assert [p.rpartition(".")[2] for p in resolved(llama, "attn", layers="0")] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


def test_prefix_names_the_module_itself_where_any_module_will_do(llama: nn.Module) -> None:
    assert resolved(llama, "attn", kinds=ANY) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert len(resolved(llama, "norm", kinds=ANY)) == 5


def test_a_whole_module_that_is_not_one_is_refused(bert: nn.Module) -> None:
    assert refusal(bert, "mlp", kinds=ANY, who="full") == (
        "targets 'mlp' is no one module of this model, and full works on whole ones; target mlp.up, mlp.down"
    )
    assert refusal(bert, "cross", kinds=ANY).startswith("targets 'cross' is a role that this model lacks; it has: ")
    assert len(resolved(bert, "mlp")) == 4


def test_a_role_that_holds_matrices_without_roles_names_those(t5: nn.Module, bert: nn.Module) -> None:
    assert resolved(bert, "pooler") == ["bert.pooler.dense"]
    assert resolved(bert, "head") == ["classifier"]
    assert len(resolved(t5, "decoder")) == 2 * 10
    assert resolved(t5, "encoder.block") == resolved(t5, "encoder")


def test_path_leaf_and_tail(llama: nn.Module) -> None:
    assert resolved(llama, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert resolved(llama, "up_proj") == resolved(llama, "mlp.up_proj") == resolved(llama, "mlp.up")
    assert resolved(llama, "lm_head") == ["lm_head"]


def test_a_tail_is_of_whole_components(llama: nn.Module) -> None:
    assert "match 0 of 15 linears" in refusal(llama, "proj")


def test_regex(llama: nn.Module) -> None:
    assert resolved(llama, r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert resolved(llama, (r".*\.0\..*q_proj", "v_proj"))[0] == "model.layers.0.self_attn.q_proj"


def test_a_regex_over_every_path_includes_the_model_itself(llama: nn.Module) -> None:
    assert resolved(llama, ".*", kinds=ANY)[0] == ""


def test_model_order_whatever_the_order_of_the_items(llama: nn.Module) -> None:
    assert resolved(llama, ("down_proj", "q_proj")) == resolved(llama, ("q_proj", "down_proj"))
    assert resolved(llama, ("down_proj", "q_proj"))[0].endswith("q_proj")


def test_overlapping_items_name_a_module_once(llama: nn.Module) -> None:
    assert resolved(llama, ("attn", "q_proj", "all-linear")) == resolved(llama, "all-linear")


def test_conv1d_is_a_linear(gpt2: nn.Module) -> None:
    assert len(resolved(gpt2, "all-linear")) == 8


def test_embedding(llama: nn.Module) -> None:
    assert resolved(llama, "embed", kinds=(nn.Embedding,)) == ["model.embed_tokens"]


def test_layers(llama: nn.Module, t5: nn.Module) -> None:
    assert {of(llama).depth(p) for p in resolved(llama, "all-linear", layers="-1")} == {1}
    assert resolved(t5, "all-linear", layers="-2") == resolved(t5, "decoder")


def test_layers_out_of_range(llama: nn.Module) -> None:
    assert refusal(llama, "attn", layers="0-5") == "layers '0-5': 5 is out of range; the model has 2 blocks, 0 to 1"


def test_nothing_in_those_layers(t5: nn.Module, bert: nn.Module) -> None:
    assert refusal(t5, ("attn", "cross.q"), layers="0-1") == (
        "targets 'cross.q' match nothing in the given layers; what they name lies in blocks 2 to 3\n"
        "the rest of targets matched: attn"
    )
    assert refusal(bert, "pooler", layers="0").endswith(
        "'pooler' match nothing in the given layers; what they name lies outside the blocks"
    )


def test_exclude(llama: nn.Module) -> None:
    assert resolved(llama, "all-linear", exclude="mlp") == resolved(llama, "attn")
    assert resolved(llama, "all-linear", exclude=("attn", "down_proj")) == resolved(llama, ("gate_proj", "up_proj"))
    assert resolved(llama, "all-linear", exclude=r".*\.0\..*") == resolved(llama, "all-linear", layers="1")


def test_exclude_drops_what_lies_within(llama: nn.Module, t5: nn.Module) -> None:
    assert resolved(llama, "all-linear", exclude="model.layers.0") == resolved(llama, "all-linear", layers="1")
    assert resolved(t5, "all-linear", exclude="decoder") == resolved(t5, "encoder")


def test_exclude_of_everything(llama: nn.Module) -> None:
    assert (
        refusal(llama, "attn", exclude="self_attn")
        == "exclude 'self_attn' leaves none of the 8 linears that targets names"
    )


def test_exclude_that_matches_nothing(llama: nn.Module) -> None:
    assert refusal(llama, "attn", exclude="lm_haed") == "exclude 'lm_haed' match 0 of 15 linears; closest: lm_head (1)"


def test_exclude_of_another_kind(llama: nn.Module) -> None:
    message = "exclude 'embed' names an Embedding; lora works on Linear"
    assert refusal(llama, "attn", exclude="embed", who="lora") == message


def test_misspelt_leaf(llama: nn.Module) -> None:
    assert (
        refusal(llama, "q_porj")
        == "targets 'q_porj' match 0 of 15 linears; closest: q_proj (2), v_proj (2), o_proj (2)"
    )


def test_misspelt_path_tail_and_role(llama: nn.Module) -> None:
    assert "closest: self_attn.q_proj (2)" in refusal(llama, "self_atn.q_proj")
    assert "closest: model.layers.0.mlp.up_proj (1)" in refusal(llama, "model.layers.0.mlp.upproj")
    assert "closest: attn.out (2)" in refusal(llama, "atn.out")
    assert "closest: all-linear (14)" in refusal(llama, "all_linear")


def test_nothing_near_lists_what_there_is(gpt2: nn.Module) -> None:
    assert (
        refusal(gpt2, "zzz")
        == "targets 'zzz' match 0 of 9 linears; there are: c_proj (4), c_attn (2), c_fc (2), lm_head (1)"
    )


def test_some_items_match(llama: nn.Module) -> None:
    assert refusal(llama, ("q_proj", "k_prj", "attn.qkv", "v_proj")).splitlines() == [
        "targets 'k_prj' match 0 of 15 linears; closest: k_proj (2), v_proj (2), q_proj (2)",
        "targets 'attn.qkv' is a role that this model lacks; it has: embed, block, attn, attn.q, attn.k, attn.v, "
        "attn.out, mlp, mlp.gate, mlp.up, mlp.down, norm.attn, norm.mlp, norm.final, head",
        "the rest of targets matched: q_proj, v_proj",
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("embed", "targets 'embed' names an Embedding; lora works on Linear, Conv1D"),
        ("norm", "targets 'norm' names a LayerNorm; lora works on Linear, Conv1D"),
        ("act", "targets 'act' names a NewGELUActivation; lora works on Linear, Conv1D"),
        ("transformer.h.0.mlp", "names a GPT2MLP; lora works on Linear, Conv1D; within: c_fc (1), c_proj (1)"),
    ],
)
def test_wrong_kind(gpt2: nn.Module, target: str, message: str) -> None:
    assert message in refusal(gpt2, target, who="lora")


def test_linears_for_a_method_of_embeddings(llama: nn.Module) -> None:
    assert (
        refusal(llama, "q_proj", kinds=(nn.Embedding,))
        == "targets 'q_proj' names a Linear; this method works on Embedding"
    )
    assert "match 0 of 1 modules" in refusal(llama, "zzz", kinds=(nn.Embedding,))
    assert "match 0 of 16 matrices" in refusal(llama, "zzz", kinds=(nn.Linear, nn.Embedding))


def test_bad_regex(llama: nn.Module) -> None:
    assert refusal(llama, "(q_proj") == (
        "targets '(q_proj' is not a role, a name or a valid regular expression: "
        "missing ), unterminated subpattern at position 0"
    )


@pytest.mark.parametrize("targets", [(), [], ""])
def test_no_targets(llama: nn.Module, targets: Any) -> None:
    assert refusal(llama, targets).startswith("targets is empty")


def test_a_layer_that_attention_never_calls_is_no_target() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    assert resolved(model, "all-linear") == [f"layers.{n}.linear{m}" for n in (0, 1) for m in (1, 2)]
    assert "MultiheadAttention reads without ever calling" in refusal(model, "out_proj")


def test_a_bare_linear() -> None:
    assert resolved(nn.Linear(2, 2), "all-linear") == [""]
