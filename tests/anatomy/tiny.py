"""Tiny random models of every architecture that has a data file."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
CROSS = {"is_decoder": True, "add_cross_attention": True}
GATED = {"feed_forward_proj": "gated-gelu"}
PLAIN = {"feed_forward_proj": "relu"}

# model type -> sizes, then (class, settings beside the sizes) that have all of its roles between them
TINY: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "llama": (
        DECODER,
        [("LlamaForCausalLM", {}), ("LlamaForSequenceClassification", {}), ("LlamaForQuestionAnswering", {})],
    ),
    "mistral": (
        DECODER,
        [("MistralForCausalLM", {}), ("MistralForTokenClassification", {}), ("MistralForQuestionAnswering", {})],
    ),
    "ministral": (
        DECODER,
        [("MinistralForCausalLM", {}), ("MinistralForTokenClassification", {}), ("MinistralForQuestionAnswering", {})],
    ),
    "ministral3": (
        DECODER,
        [
            ("Ministral3ForCausalLM", {}),
            ("Ministral3ForTokenClassification", {}),
            ("Ministral3ForQuestionAnswering", {}),
        ],
    ),
    "qwen2": (
        DECODER,
        [("Qwen2ForCausalLM", {}), ("Qwen2ForSequenceClassification", {}), ("Qwen2ForQuestionAnswering", {})],
    ),
    "qwen3": (
        DECODER,
        [("Qwen3ForCausalLM", {}), ("Qwen3ForSequenceClassification", {}), ("Qwen3ForQuestionAnswering", {})],
    ),
    "gpt2": (
        GPT2,
        [
            ("GPT2LMHeadModel", {}),
            ("GPT2LMHeadModel", {"add_cross_attention": True}),
            ("GPT2DoubleHeadsModel", {"num_labels": 1}),
            ("GPT2ForSequenceClassification", {"pad_token_id": 0}),
            ("GPT2ForTokenClassification", {}),
            ("GPT2ForQuestionAnswering", {}),
        ],
    ),
    "bert": (
        ENCODER,
        [
            ("BertModel", {}),
            ("BertForPreTraining", {}),
            ("BertLMHeadModel", CROSS),
            ("BertForSequenceClassification", {}),
            ("BertForQuestionAnswering", {}),
        ],
    ),
    **{
        model_type: (
            ENCODER,
            [
                (f"{name}Model", {}),
                (f"{name}ForMaskedLM", {}),
                (f"{name}ForCausalLM", CROSS),
                (f"{name}ForSequenceClassification", {}),
                (f"{name}ForQuestionAnswering", {}),
            ],
        )
        for model_type, name in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
    },
    **{
        model_type: (
            T5,
            [
                (f"{name}ForConditionalGeneration", PLAIN),
                (f"{name}ForConditionalGeneration", GATED),
                (f"{name}ForSequenceClassification", {}),
                (f"{name}ForTokenClassification", {}),
                (f"{name}ForQuestionAnswering", {}),
            ],
        )
        for model_type, name in (("t5", "T5"), ("mt5", "MT5"), ("umt5", "UMT5"))
    },
    "vit": (IMAGE, [("ViTModel", {}), ("ViTForImageClassification", {}), ("ViTForMaskedImageModeling", {})]),
    "deit": (
        IMAGE,
        [
            ("DeiTModel", {}),
            ("DeiTForImageClassification", {}),
            ("DeiTForMaskedImageModeling", {}),
            ("DeiTForImageClassificationWithTeacher", {}),
        ],
    ),
}


def tiny(model_type: str, name: str, **settings: Any) -> nn.Module:
    """A model of class `name`, built once for the whole session; do not change it."""
    return _built(model_type, name, tuple(settings.items()))


def tinies(model_type: str) -> list[nn.Module]:
    """All the models of one type."""
    return [tiny(model_type, name, **settings) for name, settings in TINY[model_type][1]]


@cache
def _built(model_type: str, name: str, settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY[model_type][0], **dict(settings))
    return getattr(transformers, name)(config).eval()
