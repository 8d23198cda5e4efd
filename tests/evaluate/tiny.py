"""Models of two small blocks and a byte tokenizer, with adapters that change them as much as training would."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import pegbox
from pegbox.core import Tuned

VOCABULARY = 264
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama(*, tied: bool = False, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    config |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 256, 257, 258
    return GPT2LMHeadModel(config).eval()


def _bert_config(labels: list[str]) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=258,
        id2label=dict(enumerate(labels)),
        label2id={name: k for k, name in enumerate(labels)},
    )


def bert(labels: tuple[str, ...] = ("bad", "fair", "good")) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(_bert_config(list(labels))).eval()


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(_bert_config(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 258, 257, 258
    return T5ForConditionalGeneration(config).eval()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config.image_size, config.patch_size, config.num_channels, config.num_labels = 16, 8, 3, 4
    return ViTForImageClassification(config).eval()


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = {"<s>": 256, "</s>": 257, "<pad>": 258}
    inner = Tokenizer(models.BPE({char: k for k, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert {made.bos_token_id, made.eos_token_id, made.pad_token_id} == set(specials.values())
    if chat:
        made.chat_template = CHAT
    return made


def tuned(model: nn.Module, method: str = "lora", *, by: float = 0.005, seed: int = 1, **settings: Any) -> Tuned:
    """An adapter whose every trained number has moved by about `by`."""
    made = pegbox.tune(model, method, **settings).eval()
    moved(made, by, seed)
    return made


def moved(made: Tuned, by: float = 0.005, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
