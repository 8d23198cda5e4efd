"""Targets mean what they mean in HF PEFT, where PEFT gives them a meaning.

Deliberate differences, each shown below: `all-linear` leaves every task head alone, for PEFT only the output embedding
and, when told that the task is sequence classification, its head; and a lone string is tried as a name before it is
tried as a regular expression.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
from torch import nn

from pegbox.anatomy import of

from .tiny import tiny

# PEFT asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def in_peft(model: nn.Module, targets: Any, **given: Any) -> list[str]:
    config = peft.LoraConfig(r=2, target_modules=targets, **given)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    return sorted(tuned.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["self_attn.q_proj"],
        ["model.layers.1.mlp.up_proj", "down_proj"],
        ["lm_head", "0.self_attn.k_proj"],
        r".*layers\.(0|1)\.mlp\.(gate|up)_proj",
        r"model\.layers\.1\..*_proj",
        "all-linear",
    ],
)
def test_llama(targets: str | list[str]) -> None:
    model = tiny("llama", "LlamaForCausalLM")
    assert sorted(of(model).resolve(targets)) == in_peft(model, targets)


@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_proj"], ["attn.c_proj"], r".*h\.0\.(attn|mlp)\.c_.*", "all-linear"]
)
def test_gpt2(targets: str | list[str]) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    assert sorted(of(model).resolve(targets)) == in_peft(model, targets, fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("model_type", "name"), [("bert", "BertForSequenceClassification"), ("roberta", "RobertaForSequenceClassification")]
)
@pytest.mark.parametrize("targets", [["query", "value"], ["output.dense"], ["attention.output.dense"], "all-linear"])
def test_classification(model_type: str, name: str, targets: str | list[str]) -> None:
    model = tiny(model_type, name)
    assert sorted(of(model).resolve(targets)) == in_peft(model, targets, task_type="SEQ_CLS")


def test_exclude() -> None:
    model = tiny("llama", "LlamaForCausalLM")
    for exclude in (["mlp.up_proj", "o_proj"], r".*layers\.0.*_proj"):
        ours = of(model).resolve("all-linear", exclude=exclude)
        assert sorted(ours) == in_peft(model, "all-linear", exclude_modules=exclude)


def test_layers() -> None:
    model = tiny("llama", "LlamaForCausalLM")
    ours = of(model).resolve(["q_proj", "up_proj"], layers="1")
    assert sorted(ours) == in_peft(model, ["q_proj", "up_proj"], layers_to_transform=[1])


def test_all_linear_leaves_every_head_alone() -> None:
    for model, heads in (
        (tiny("bert", "BertForQuestionAnswering"), {"qa_outputs"}),
        (tiny("bert", "BertForPreTraining"), {"cls.seq_relationship"}),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), {"2"}),
    ):
        assert set(in_peft(model, "all-linear")) - set(of(model).resolve("all-linear")) == heads


def test_a_lone_string_may_be_a_name() -> None:
    model = tiny("llama", "LlamaForCausalLM")
    assert of(model).resolve("q_proj") == of(model).resolve(["q_proj"])
    with pytest.raises(ValueError, match="not found"):
        in_peft(model, "q_proj")
