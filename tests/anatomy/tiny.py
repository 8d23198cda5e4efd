"""Tiny random models of every architecture that has a data file."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

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
EXPERTS = {
    **DECODER,
    "num_local_experts": 4,  # Mixtral's name
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50, "max_position_embeddings": 64}
DEBERTA = {
    **ENCODER,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 2,
    "pooler_hidden_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
BART = {**TWO_STACKS, "max_position_embeddings": 64, "forced_eos_token_id": None}
WHISPER = {
    **TWO_STACKS,
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "max_target_positions": 32,
    "classifier_proj_size": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SWIN = {
    "image_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
TEXT_TOWER = {**ENCODER, "max_position_embeddings": 32, "projection_dim": 16}
IMAGE_TOWER = {**IMAGE, "projection_dim": 16}
SIGLIP_TEXT = {**ENCODER, "max_position_embeddings": 32, "projection_size": 32}
TWO_TOWERS = {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER, "projection_dim": 16}
IMAGE_TOKEN = 49
LLAVA = {
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **IMAGE_TOWER},
    "image_token_index": IMAGE_TOKEN,
    "vision_feature_layer": -1,
}
GEMMA3_TEXT = {**DECODER, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3 = {
    "text_config": {"model_type": "gemma3_text", **GEMMA3_TEXT},
    "vision_config": {"model_type": "siglip_vision_model", **IMAGE, "vision_use_head": False},
    "mm_tokens_per_image": 4,
    "image_token_index": IMAGE_TOKEN,
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
    "gemma": (DECODER, [("GemmaForCausalLM", {}), ("GemmaForSequenceClassification", {})]),
    "gemma2": (
        {**DECODER, "sliding_window": 4},
        [("Gemma2ForCausalLM", {}), ("Gemma2ForTokenClassification", {})],
    ),
    "gemma3_text": (GEMMA3_TEXT, [("Gemma3ForCausalLM", {}), ("Gemma3TextForSequenceClassification", {})]),
    "gemma3": (GEMMA3, [("Gemma3ForConditionalGeneration", {}), ("Gemma3ForSequenceClassification", {})]),
    "phi": (DECODER, [("PhiForCausalLM", {"qk_layernorm": True}), ("PhiForSequenceClassification", {})]),
    "phi3": (DECODER, [("Phi3ForCausalLM", {}), ("Phi3ForTokenClassification", {})]),
    "gpt_neox": (
        ENCODER,
        [
            ("GPTNeoXForCausalLM", {}),
            ("GPTNeoXForSequenceClassification", {}),
            ("GPTNeoXForTokenClassification", {}),
            ("GPTNeoXForQuestionAnswering", {}),
        ],
    ),
    "mixtral": (
        EXPERTS,
        [("MixtralForCausalLM", {}), ("MixtralForTokenClassification", {}), ("MixtralForQuestionAnswering", {})],
    ),
    "qwen2_moe": (
        EXPERTS,
        [
            ("Qwen2MoeForCausalLM", {}),
            ("Qwen2MoeForSequenceClassification", {"mlp_only_layers": [1]}),
            ("Qwen2MoeForQuestionAnswering", {}),
        ],
    ),
    "qwen3_moe": (
        EXPERTS,
        [
            ("Qwen3MoeForCausalLM", {}),
            ("Qwen3MoeForSequenceClassification", {"mlp_only_layers": [1]}),
            ("Qwen3MoeForQuestionAnswering", {}),
        ],
    ),
    "distilbert": (
        DISTILBERT,
        [
            ("DistilBertForMaskedLM", {}),
            ("DistilBertForSequenceClassification", {}),
            ("DistilBertForTokenClassification", {}),
            ("DistilBertForQuestionAnswering", {}),
        ],
    ),
    "deberta": (
        DEBERTA,
        [
            ("DebertaForMaskedLM", {}),
            ("DebertaForMaskedLM", {"legacy": False}),
            ("DebertaModel", {"embedding_size": 16}),
            ("DebertaForSequenceClassification", {}),
            ("DebertaForTokenClassification", {}),
            ("DebertaForQuestionAnswering", {}),
        ],
    ),
    "deberta-v2": (
        {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
        [
            ("DebertaV2ForMaskedLM", {}),
            ("DebertaV2ForMaskedLM", {"legacy": False}),
            ("DebertaV2Model", {"embedding_size": 16}),
            ("DebertaV2ForSequenceClassification", {}),
            ("DebertaV2ForTokenClassification", {}),
            ("DebertaV2ForQuestionAnswering", {}),
        ],
    ),
    "bart": (
        BART,
        [
            ("BartForConditionalGeneration", {}),
            ("BartForSequenceClassification", {}),
            ("BartForQuestionAnswering", {}),
            ("BartForCausalLM", {}),
        ],
    ),
    "whisper": (
        WHISPER,
        [("WhisperForConditionalGeneration", {}), ("WhisperForAudioClassification", {}), ("WhisperForCausalLM", {})],
    ),
    "swin": (
        SWIN,
        [("SwinForImageClassification", {}), ("SwinForMaskedImageModeling", {}), ("SwinBackbone", {})],
    ),
    "clip": (TWO_TOWERS, [("CLIPModel", {}), ("CLIPForImageClassification", {})]),
    "clip_text_model": (TEXT_TOWER, [("CLIPTextModel", {}), ("CLIPTextModelWithProjection", {})]),
    "clip_vision_model": (IMAGE_TOWER, [("CLIPVisionModel", {}), ("CLIPVisionModelWithProjection", {})]),
    "siglip": (
        {"text_config": SIGLIP_TEXT, "vision_config": IMAGE},
        [("SiglipModel", {}), ("SiglipForImageClassification", {})],
    ),
    "siglip_text_model": (SIGLIP_TEXT, [("SiglipTextModel", {})]),
    "siglip_vision_model": (IMAGE, [("SiglipVisionModel", {})]),
    "llava": (LLAVA, [("LlavaForConditionalGeneration", {})]),
}


_BUILT: dict[str, nn.Module] = {}


def tiny(model_type: str, name: str, **settings: Any) -> nn.Module:
    """A model of class `name`, built once for the whole session; do not change it."""
    key = f"{name} {model_type} {settings}"
    if key not in _BUILT:
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        _BUILT[key] = cls(cls.config_class(**{**TINY[model_type][0], **settings})).eval()
        for parameter in _BUILT[key].parameters():
            if parameter.dim() > 1 and not parameter.any():  # a new projector of Gemma 3 cuts the vision tower off
                nn.init.normal_(parameter, std=0.02)
    return _BUILT[key]


def tinies(model_type: str) -> list[nn.Module]:
    """All the models of one type."""
    return [tiny(model_type, name, **settings) for name, settings in TINY[model_type][1]]
