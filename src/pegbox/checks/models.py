"""Tiny random models of every kind a method meets: hidden 32, two blocks, a vocabulary of 60; milliseconds to build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.checks import kinds

Has = Literal[
    "bias", "norms", "lookups", "token ids", "blocks", "hidden states", "skips", "generation", "checkpointing"
]
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
        score: of answers and labels, where its forward computes no loss.
        package: what must be installed beside transformers, and the extra that brings it.
        matrices: what replaces them for a method that maps weights, where the family is there for other layouts.
        quantised: how most of its matrices are kept, if not as plain numbers.
        rounding: how far its layers' own forward may be from computing with their matrices, relative to outputs.
        given: what a method may read from the context, by name.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    has: frozenset[Has]
    takes_labels: bool = True
    targets: str | None = None
    score: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    package: tuple[str, str] | None = None
    matrices: str | None = None
    quantised: str | None = None
    rounding: float = 0.0
    given: Callable[[], Mapping[str, Any]] = dict

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        """Mean cross-entropy, or what else `score` says, on one batch."""
        batch = self.batch(seed)
        if self.takes_labels:
            loss: Tensor = model(**batch).loss
            return loss
        return self.score(answer(model(**inputs(batch))), batch["labels"])


def answer(out: Any) -> Tensor:
    """The tensor a model answers with."""
    if isinstance(out, Tensor):
        return out
    tensor: Tensor = out["logits" if "logits" in out else "sample"]
    return tensor


def inputs(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {k: v for k, v in batch.items() if k != "labels"}


def llama(*, hidden: int = 32, mlp: int = 48, heads: int = 4, kv_heads: int = 2, tied: bool = False) -> nn.Module:
    """Grouped-query attention: half as many key and value heads as query heads; no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(hidden, mlp, heads, kv_heads), tie_word_embeddings=tied))


def mixture() -> nn.Module:
    """A decoder whose experts keep their matrices in two parameters of one module; every token goes to both."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_decoder(), num_local_experts=2, num_experts_per_tok=2))


def _decoder(hidden: int = 32, mlp: int = 48, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "bos_token_id": 1,
        "initializer_range": 0.1,
        "use_cache": False,
    }


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


def unet() -> nn.Module:
    """A denoiser of 8 x 8 pixels, conditioned on a text: attention and skips at two sizes."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    return _enlarged(model)


def dit() -> nn.Module:
    """A denoiser of 8 x 8 pixels in sixteen patches, conditioned on a class."""
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return _enlarged(model)


def _enlarged(model: nn.Module) -> nn.Module:
    """Matrices from N(0, 0.1^2), as those of the other families."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


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


def noised_images(seed: int) -> Batch:
    """What a denoiser reads, and the noise as labels."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "timestep": torch.randint(1000, (ROWS,), generator=draw),
        "labels": torch.randn(ROWS, 3, 8, 8, generator=draw),
    }


def captioned_images(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed + 2000)
    caption = torch.randn(ROWS, 5, 12, generator=draw)
    return {
        "sample": torch.randn(ROWS, 3, 8, 8, generator=draw),
        "encoder_hidden_states": caption,
        **noised_images(seed),
    }


def hints() -> dict[str, Tensor]:
    """Grey images to condition a denoiser on."""
    return {"hint": torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def classified_noise(seed: int) -> Batch:
    pixels = images(seed)["pixel_values"]
    return {"hidden_states": pixels, "class_labels": _classes(seed), **noised_images(seed)}


def squares(seed: int) -> Batch:
    x = torch.randn(ROWS, 4, 9, 7, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": _classes(seed)}


def words(seed: int) -> Batch:
    return {"ids": _ids(seed), "labels": _classes(seed)}


_DIFFUSERS = ("diffusers", "diffusion")
_BNB = ("bitsandbytes", "quantised")
_BLOCKS: frozenset[Has] = frozenset({"blocks", "norms", "hidden states", "checkpointing"})
_DECODER: frozenset[Has] = _BLOCKS | {"token ids", "lookups", "generation"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", llama, text, _DECODER),
        Family("gpt2", gpt2, text, _DECODER | {"bias"}),
        Family("bert", bert, classified_text, _BLOCKS | {"bias", "token ids", "lookups"}),
        Family("t5", t5, translation, _DECODER),
        Family("vit", vit, images, _BLOCKS | {"bias"}),
        Family("mlp", Mlp, features, frozenset({"bias"}), takes_labels=False, targets="all-linear"),
        Family(
            "unet",
            unet,
            captioned_images,
            frozenset({"bias", "blocks", "norms", "skips"}),
            takes_labels=False,
            score=F.mse_loss,
            package=_DIFFUSERS,
            given=hints,
        ),
        Family(
            "dit",
            dit,
            classified_noise,
            frozenset({"bias", "blocks", "lookups"}),
            takes_labels=False,
            score=F.mse_loss,
            package=_DIFFUSERS,
        ),
        Family(
            "conv",
            kinds.Convolutions,
            squares,
            frozenset({"bias"}),
            takes_labels=False,
            targets="mix",
            matrices="stride,groups,point,line",
        ),
        Family(
            "embedding",
            kinds.Lookups,
            words,
            frozenset({"bias", "lookups"}),
            takes_labels=False,
            targets="mix",
            matrices="embed,scaled",
        ),
        Family("nf4", lambda: kinds.nf4(llama()), text, _DECODER, package=_BNB, quantised="nf4"),
        Family("int8", lambda: kinds.int8(llama()), text, _DECODER, package=_BNB, quantised="int8", rounding=0.05),
        Family("tied", tied, text, _DECODER),
        Family("odd", odd, text, _DECODER),
    )
}
