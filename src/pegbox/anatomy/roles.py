"""The closed vocabulary of roles, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Container

ROLES: dict[str, str] = {
    "embed": "the layer that turns the input into vectors: token embedding, patch projection",
    "embed.position": "position embedding, where it is a module",
    "embed.type": "token-type (segment) embedding",
    "embed.proj": "projection of embeddings to the width of the blocks",
    "embed.class": "class embedding",
    "time": "embedding of the time step of a diffusion",
    "block": "a repeated block, encoder's and decoder's alike",
    "encoder.block": "a block of the encoder, in a model with two stacks",
    "decoder.block": "a block of the decoder, in a model with two stacks",
    "vision": "vision tower, whole, of a model that also reads text",
    "vision.block": "a block of the vision tower",
    "text": "text tower or language model, whole, of a model that also reads images",
    "text.block": "a block of the text tower",
    "projector": "what carries a tower's vectors into the other tower, or into a space that both share",
    "unet.down": "a block of a U-Net's encoder, which makes skips",
    "unet.mid": "the block between the two",
    "unet.up": "a block of its decoder, which takes them",
    "resnet": "residual block of convolutions, whole",
    "resnet.conv": "its convolutions",
    "resnet.shortcut": "the convolution beside them, where the channels change",
    "resnet.time": "projection of the time embedding to its channels",
    "downsample": "what lowers the resolution between blocks",
    "upsample": "what raises it",
    "transformer": "transformer between convolutions, whole",
    "transformer.in": "projection into it",
    "transformer.out": "projection out of it",
    "attn": "self-attention, whole",
    "attn.q": "query projection",
    "attn.k": "key projection",
    "attn.v": "value projection",
    "attn.qkv": "query, key and value projection in one matrix",
    "attn.position": "projections of relative positions to queries and keys",
    "attn.out": "output projection of attention; its output is the sublayer's, before the residual sum",
    "cross": "cross-attention, whole",
    "cross.q": "query projection of cross-attention",
    "cross.k": "key projection of cross-attention",
    "cross.v": "value projection of cross-attention",
    "cross.kv": "key and value projection of cross-attention in one matrix",
    "cross.out": "output projection of cross-attention",
    "mlp": "feed-forward network, whole",
    "mlp.gate": "gate projection",
    "mlp.up": "projection to the inner width",
    "mlp.gate_up": "gate and up projection in one matrix",
    "mlp.down": "projection back; its output is the sublayer's, before the residual sum",
    "mlp.router": "what chooses a token's experts and weighs them",
    "mlp.experts": "the experts of a mixture, whole",
    "modulation": "what makes the scales and shifts of norms, of time and class",
    "norm.embed": "norm after the embeddings",
    "norm.attn": "norm before or after self-attention",
    "norm.cross": "norm before or after cross-attention",
    "norm.mlp": "norm before or after the feed-forward network",
    "norm.q": "norm of the queries",
    "norm.k": "norm of the keys",
    "norm.block": "another norm inside a block",
    "norm.final": "norm after the last block",
    "pooler": "what makes one vector of a sequence",
    "head": "what gives the model's answer: lm_head, score, classifier, qa_outputs",
}

TOWERS = ("vision", "text")  # roles of modules that are models of their own type


def under(prefix: str, names: Container[str]) -> list[str]:
    """The roles among `names` that lie beneath `prefix`: `attn` has `attn.q`, `attn.k`, and so on."""
    return [role for role in ROLES if role.startswith(f"{prefix}.") and role in names]


def is_role(name: str) -> bool:
    """Whether `name` is a role or the prefix of one."""
    return name in ROLES or bool(under(name, ROLES))
