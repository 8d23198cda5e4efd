"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021), arXiv:2101.00190.

    every layer attends to n trained pairs of keys and values before those of the text
    softmax(s q [P_k, K]^T) [P_v, V]        P_k, P_v: (n, width)
    [P_k, P_v of all L layers] = P                          P: (n, 2 L width)
                               = W2 tanh(W1 E + b1) + b2    with a projection: E (n, width), hidden units h

width = key-value heads times their dimension.  The paper trains through the projection and throws it away afterwards;
here the file holds both what it gives, which is all that HF PEFT keeps, and what it is made of, so that training can
go on.  Drawn as in HF PEFT, the projection being off by default: P and E normal, W1 and W2 as `nn.Linear`'s.  In an
encoder-decoder all self-attentions get a prefix, the paper's two of three places (cross-attention is a target too).

HF PEFT gives a prefix to the decoder alone, and its layers share pairs: of L layers, layer i uses the keys 4i and the
values 4i + 1 of its 2L vectors, counted in a circle.  Such a file is taken apart into a prefix of each layer's own
(`stacks="decoder"`); none is written, for PEFT has no place for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Graft, Method, PeftLayout, Site, Traits, by_settings, setting
from pegbox.core.errors import AdapterError, TargetError
from pegbox.core.prefix import Pairs, Place, Survey, by_layer, in_every_layer, prefix_graft, prefix_peft, survey
from pegbox.core.tokens import decoder_path

PROJECTION = ("embedding", "w1", "b1", "w2", "b2")


class Prefix(Pairs):
    """P itself."""

    def __init__(self, found: Survey, method: PrefixTuning) -> None:
        super().__init__(found, method.tokens)
        start = torch.zeros if method.start == "zero" else torch.randn
        for i, place in enumerate(found.places.values()):
            self.register_parameter(f"prefix_{i}", nn.Parameter(start(method.tokens, 2, place.width)))

    def of(self, place: Place) -> Tensor:
        own: Tensor = getattr(self, f"prefix_{place.index}")
        return own


class ProjectedPrefix(Pairs):
    """P as what two layers make of a smaller matrix."""

    def __init__(self, found: Survey, method: PrefixTuning) -> None:
        super().__init__(found, method.tokens)
        widths = [place.width for place in found.places.values()]
        width = max(widths)
        hidden = method.hidden or width
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, 2 * sum(widths))
        self.embedding = nn.Parameter(torch.randn(method.tokens, width))  # (n, width)
        self.w1, self.b1, self.w2, self.b2 = first.weight, first.bias, second.weight, second.bias
        if method.start == "zero":
            nn.init.zeros_(self.w2)
            nn.init.zeros_(self.b2)

    def of(self, place: Place) -> Tensor:
        rows = slice(place.start, place.start + 2 * place.width)
        made = projected(self.embedding, self.w1, self.b1, self.w2[rows], self.b2[rows])
        return made.unflatten(1, (2, -1))


def projected(embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(n, width) -> (n, rows of w2)."""
    return F.linear(torch.tanh(F.linear(embedding, w1, b1)), w2, b2)


TRAITS = Traits(
    seams=("tokens",),
    card="llm-adapters",
    identity=False,
    merge="no",
    needs=("blocks",),
    peft=PeftLayout("PREFIX_TUNING", tensors={"prefix": "prompt_embeddings"}, fields={"tokens": "num_virtual_tokens"}),
    xfail={
        "padding_changes_nothing[t5]": "T5 sees distances, and padding on the left comes between the prefix and the "
        "text of its encoder; on the right, where T5's tokenizer pads, it changes nothing",
    },
)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    targets: str | tuple[str, ...] = setting("attn", "the attentions that get a prefix: a role, names, or a regex")
    tokens: int = setting(20, "pairs of keys and values before those of the text", at_least=1)
    projection: bool = setting(False, "train the pairs through two layers")
    hidden: int = setting(0, "width between the two layers; 0 for that of the keys", at_least=0)
    start: Literal["random", "zero"] = setting("random", "draw the pairs, or start with zeros")
    stacks: Literal["all", "decoder"] = setting("all", "of an encoder-decoder: both, or the decoder alone")

    traits: ClassVar[Traits] = by_settings(
        TRAITS, lambda method: TRAITS if method.stacks == "all" else replace(TRAITS, peft=None, xfail={})
    )
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return self._survey(model, anatomy).paths

    def _survey(self, model: nn.Module, anatomy: Anatomy) -> Survey:
        attentions = super().sites(model, anatomy)
        if self.stacks == "decoder":
            decoder = decoder_path(model)
            if decoder is None:
                raise TargetError(f"stacks='decoder' is for an encoder-decoder, and {type(model).__name__} is none")
            attentions = [path for path in attentions if path.startswith(f"{decoder}.")]
        return survey(model, anatomy, attentions)

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Pairs:
        found = self._survey(model, anatomy)
        pairs = ProjectedPrefix(found, self) if self.projection else Prefix(found, self)
        return pairs.to(next(model.parameters()).device)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Pairs)
        return prefix_graft(site, shared)

    def in_peft(self, model: nn.Module, shared: nn.Module | None) -> bool:
        assert isinstance(shared, Pairs)
        return decoder_path(model) is None and in_every_layer(model, shared.survey)

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.projection:
            return dict(tensors) | {"prefix": projected(*(tensors[name] for name in PROJECTION))}
        return {"prefix": torch.cat([own.flatten(1) for own in tensors.values()], dim=1)}

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = tensors.get("prefix")
        if not self.projection:
            return {} if given is None else by_layer(given, own, shared=self.stacks == "decoder")
        if given is None or given.shape != (self.tokens, len(own["w2"])):
            raise AdapterError("the file lacks the prefix that its projection gives, or has another")
        return {}  # made anew of the rest

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        said = prefix_peft(model)
        hidden = self.hidden or said["token_dim"]
        start = "zero" if self.start == "zero" else None
        return said | {"prefix_projection": self.projection, "encoder_hidden_size": hidden, "init_weights": start}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"stacks": "decoder"} if config.get("num_transformer_submodules") == 2 else {}
