from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from pegbox.anatomy import of
from pegbox.anatomy.discover import discover

from .tiny import TINY, tiny

# Where the names alone do not say what the data file says; everything else must be found alike.
BEYOND_NAMES = {
    "t5": {"norm.attn", "norm.cross", "norm.mlp", "norm.block"},  # all three are called layer_norm
    "mt5": {"norm.attn", "norm.cross", "norm.mlp", "norm.block"},
    "umt5": {"norm.attn", "norm.cross", "norm.mlp", "norm.block"},
    "gemma2": {"norm.attn", "norm.mlp"},  # elsewhere post_attention_layernorm is before the MLP
    "gemma3_text": {"norm.attn", "norm.mlp"},
    "gemma3": {"norm.attn", "norm.mlp", "norm.final"},
    "mixtral": {"mlp.router"},  # elsewhere mlp.gate is a gate projection
    "qwen2_moe": {"mlp.router"},
    "qwen3_moe": {"mlp.router"},
    "distilbert": {"norm.final"},  # that of the MLM head
    "deberta": {"attn.qkv", "embed", "norm.final"},  # in_proj alone could be anything; rel_embeddings is never called
    "deberta-v2": {"embed", "norm.embed", "norm.final"},
    "whisper": {"embed", "pooler"},
    "swin": {"block", "downsample", "embed.position", "norm.block", "pooler"},  # stages pass for blocks
    "clip": {"projector"},  # the last one passes for a head
    "clip_text_model": {"projector", "text", "text.block"},
    "clip_vision_model": {"projector", "vision", "vision.block"},
    "siglip": {"pooler", "projector"},
    "siglip_text_model": {"projector"},
    "siglip_vision_model": {"pooler"},
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), Attention(), nn.RMSNorm(8)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(8, 16), act=nn.GELU(), fc2=nn.Linear(16, 8)))
        self.scale = nn.LayerNorm(8)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.project = nn.Linear(8, 8)
        self.start = nn.LayerNorm(8)
        self.trunk = nn.ModuleList([Block() for _ in range(3)])
        self.end = nn.LayerNorm(8)
        self.logits = nn.Linear(8, 10)


def test_an_unknown_model() -> None:
    found = of(Custom())
    assert (found.model_type, found.source) == (None, "discovered")
    assert found.blocks == ["trunk.0", "trunk.1", "trunk.2"]
    assert (found.embed, found.head) == ("tokens", "logits")
    assert found.role("attn.out")[2] == "trunk.2.attn.to_out"
    assert found.role("mlp.down")[0] == "trunk.0.mlp.fc2"
    assert found.role("norm.embed") == ["start"]
    assert found.role("norm.final") == ["end"]
    assert found.role("norm.mlp")[1] == "trunk.1.norm2"
    assert found.role("norm.block") == ["trunk.0.scale", "trunk.1.scale", "trunk.2.scale"]


def test_a_headless_trunk_has_no_head() -> None:
    model = Custom()
    del model.logits
    assert of(model).head is None


def test_a_perceptron_is_its_own_blocks_and_head() -> None:
    found = of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert (found.blocks, found.head) == ([], "4")


def test_a_list_of_linears_is_a_stack_of_blocks() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.out = nn.Linear(4, 2)

    found = of(Stack())
    assert (found.blocks, found.head) == (["layers.0", "layers.1"], "out")


def test_lists_inside_blocks_are_not_blocks() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Block() for _ in range(5)])

    found = of(nn.ModuleDict({"layers": nn.ModuleList([Mixture(), Mixture()])}))
    assert found.blocks == ["layers.0", "layers.1"]
    assert found.depth("layers.1.experts.4.attn.to_q") == 1


def test_blocks_of_two_classes_in_turn() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Attention(), Block()])})
    assert of(model).blocks == ["layers.0", "layers.1", "layers.2"]


def test_torch_transformer() -> None:
    found = of(nn.Transformer(8, 2, 1, 1, 16, batch_first=True))
    assert found.blocks == ["encoder.layers.0", "decoder.layers.0"]
    assert found.role("encoder.block") == ["encoder.layers.0"]
    assert found.role("cross") == ["decoder.layers.0.multihead_attn"]
    assert found.role("mlp.up") == ["encoder.layers.0.linear1", "decoder.layers.0.linear1"]


def test_an_embedding_that_only_keeps_a_tied_matrix_is_passed_over() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(10, 8)
            self.encoder = nn.ModuleDict({"tokens": nn.Embedding(10, 8)})
            self.encoder["tokens"].weight = self.shared.weight

    assert of(Tied()).role("embed") == ["encoder.tokens"]


def test_discovery_needs_no_memory_for_weights() -> None:
    with torch.device("meta"):
        assert of(Custom()).head == "logits"


@pytest.mark.parametrize("model_type", TINY)
def test_discovery_finds_the_blocks_and_parts_of_the_data_files(model_type: str) -> None:
    other = {"head", "encoder.block", "decoder.block"} | BEYOND_NAMES.get(model_type, set())
    for name, settings in TINY[model_type][1]:
        model = tiny(model_type, name, **settings)
        known, guessed = of(model).found, discover(model)
        within_head = ("cls.", "lm_head.")  # a norm inside an MLM head is no norm.final in the data files
        guessed = {role: tuple(p for p in paths if not p.startswith(within_head)) for role, paths in guessed.items()}
        for role in {**known, **guessed}.keys() - other:
            assert guessed.get(role, ()) == known.get(role, ()), (name, role)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForQuestionAnswering"),
        ("llama", "LlamaModel"),
        ("bert", "BertModel"),
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForMaskedLM"),
        ("xlm-roberta", "XLMRobertaForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("t5", "T5ForSequenceClassification"),
        ("vit", "ViTModel"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_discovery_finds_the_head(model_type: str, name: str) -> None:
    model = tiny(model_type, name)
    assert discover(model).get("head") == of(model).found.get("head")
