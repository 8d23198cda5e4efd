"""Tiny random models of every kind a method meets: hidden 32, two blocks, a vocabulary of 60; milliseconds to build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Has = Literal["bias", "token ids", "generation", "checkpointing"]
Batch = dict[str, Tensor]

VOCABULARY, CLASSES, ROWS, LENGTH = 60, 3, 4, 8
PAD = 0


@dataclass(frozen=True)
class Family:
    """A kind of model, with batches it understands.

    Attributes:
        name: how checks and reports call it.
        build: makes a model; its weights come from the global generator, which the caller seeds.
        batch: keyword arguments of the model's forward for a seed, ROWS rows, `labels` among them.
        has: what a method may need of a model.
        takes_labels: whether its forward computes the loss.
        targets: what replaces targets that name roles, where the model has none.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    has: frozenset[Has]
    takes_labels: bool = True
    targets: str | None = None

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        """Mean cross-entropy on one batch."""
        batch = self.batch(seed)
        if self.takes_labels:
            loss: Tensor = model(**batch).loss
            return loss
        return F.cross_entropy(model(**inputs(batch)), batch["labels"])


def inputs(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {k: v for k, v in batch.items() if k != "labels"}


def llama(*, hidden: int = 32, mlp: int = 48, heads: int = 4, kv_heads: int = 2, tied: bool = False) -> nn.Module:
    """Grouped-query attention: half as many key and value heads as query heads; no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=None,
        bos_token_id=1,
        initializer_range=0.1,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def tied() -> nn.Module:
    """A Llama whose head is its embedding."""
    return llama(tied=True)


def odd() -> nn.Module:
    """A Llama of sizes that 8 does not divide: 36, 18 and 50."""
    return llama(hidden=36, mlp=50, heads=6, kv_heads=3)


def gpt2() -> nn.Module:
    """Conv1D layers, fused q, k and v, biases, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.1,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """An encoder with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.1,
    )
    config.num_labels = CLASSES
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    """An encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=None,
        use_cache=False,
    )
    config.decoder_start_token_id = PAD
    return T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    """An image classifier: 8 x 8 pixels in four patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    config.num_labels = CLASSES
    return ViTForImageClassification(config)


class Mlp(nn.Module):
    """An architecture that nobody has described: no config, no roles, a plain tensor in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(12, 32)
        self.mix = nn.Linear(32, 48)
        self.fold = nn.Linear(48, 32)
        self.answer = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, 12) -> (B, CLASSES)
        h = self.lift(x)
        answer: Tensor = self.answer(h + self.fold(self.mix(h).tanh()))
        return answer


def _ids(seed: int, length: int = LENGTH) -> Tensor:
    """(ROWS, length), without the padding token."""
    return torch.randint(2, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def _classes(seed: int) -> Tensor:
    return torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(seed + 1000))


def text(seed: int) -> Batch:
    ids = _ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def classified_text(seed: int) -> Batch:
    ids = _ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _classes(seed)}


def translation(seed: int) -> Batch:
    ids, answer = _ids(seed), _ids(seed + 500, 5)
    started = torch.cat([torch.full((ROWS, 1), PAD), answer[:, :-1]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": started,
        "labels": answer,
    }


def images(seed: int) -> Batch:
    pixels = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": _classes(seed)}


def features(seed: int) -> Batch:
    x = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": _classes(seed)}


_DECODER: frozenset[Has] = frozenset({"token ids", "generation", "checkpointing"})

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", llama, text, _DECODER),
        Family("gpt2", gpt2, text, _DECODER | {"bias"}),
        Family("bert", bert, classified_text, frozenset({"bias", "token ids", "checkpointing"})),
        Family("t5", t5, translation, _DECODER),
        Family("vit", vit, images, frozenset({"bias", "checkpointing"})),
        Family("mlp", Mlp, features, frozenset({"bias"}), takes_labels=False, targets="all-linear"),
        Family("tied", tied, text, _DECODER),
        Family("odd", odd, text, _DECODER),
    )
}
