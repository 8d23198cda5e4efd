"""The closed vocabulary of roles, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Container

ROLES: dict[str, str] = {
    "embed": "the layer that turns the input into vectors: token embedding, patch projection",
    "embed.position": "position embedding, where it is a module",
    "embed.type": "token-type (segment) embedding",
    "block": "a repeated block, encoder's and decoder's alike",
    "encoder.block": "a block of the encoder, in a model with two stacks",
    "decoder.block": "a block of the decoder, in a model with two stacks",
    "attn": "self-attention, whole",
    "attn.q": "query projection",
    "attn.k": "key projection",
    "attn.v": "value projection",
    "attn.qkv": "query, key and value projection in one matrix",
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
    "mlp.down": "projection back; its output is the sublayer's, before the residual sum",
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


def under(prefix: str, names: Container[str]) -> list[str]:
    """The roles among `names` that lie beneath `prefix`: `attn` has `attn.q`, `attn.k`, and so on."""
    return [role for role in ROLES if role.startswith(f"{prefix}.") and role in names]


def is_role(name: str) -> bool:
    """Whether `name` is a role or the prefix of one."""
    return name in ROLES or bool(under(name, ROLES))
