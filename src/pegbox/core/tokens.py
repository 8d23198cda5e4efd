"""The seam for virtual tokens: trained vectors that a model reads before every input.

    the model reads  [v_1 .. v_n, e(x_1) .. e(x_T)]        v: (n, d), e: the frozen embedding

Positions, masks and labels are extended, and the outputs at the n virtual tokens are cut off again, so that the tuned
model has the shapes of the base.  Placeholder ids take the virtual tokens' places, so that whatever a model reads off
its ids (padding, positions, the last token to classify) stays right; their embeddings are then replaced.  With a
key-value cache they are read once.  An encoder-decoder gets them before the encoder's tokens, and its decoder attends
to them.  Stacked adapters' tokens follow one another, those of the first adapter first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import ModelError
from pegbox.core.graft import Graft
from pegbox.core.site import Base, Site


class VirtualTokens(nn.Module):
    """What the grafts of one adapter share: how many virtual tokens, and what they are.

    Args:
        model: the base.
        count: how many.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.count = count
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.placeholder = 1 if pad == 0 else 0  # any id but the padding's
        self.decoder = _stacks(model)[-1] if _stacks(model) else None
        self.at: int | None = None  # where they go in the ids now under way

    @abstractmethod
    def embed(self, embedded: Tensor) -> Tensor:
        """The virtual tokens (n, d), or (B, n, d), before the embedded input (B, T, d)."""


def token_sites(model: nn.Module, embedding: str) -> list[str]:
    """The sites of a method of virtual tokens: the model, its encoder and decoder if it has both, the embedding."""
    return ["", *_stacks(model), embedding]


def token_graft(site: Site, tokens: VirtualTokens) -> Graft:
    """What runs around one of `token_sites`."""
    if isinstance(site.module, nn.Embedding):
        return ReplaceGraft(tokens)
    if site.path == tokens.decoder:
        return AttendGraft(tokens)
    return ApartGraft(tokens) if tokens.decoder and site.path == "" else InsertGraft(tokens)


class _TokenGraft(Graft):
    def __init__(self, tokens: VirtualTokens) -> None:
        super().__init__()
        self.owner = (tokens,)  # shared, so not registered here


class InsertGraft(_TokenGraft):
    """Around the model, or its encoder: makes room at the start of every row, and cuts a model's outputs there off."""

    def forward(
        self, base: Base, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if input_ids is None:
            raise ModelError("virtual tokens go before input_ids, and the model was called without any")
        tokens, length = self.owner[0], input_ids.shape[1]
        n = tokens.count
        packed = attention_mask is None
        attention_mask = None if attention_mask is None else _prepend(attention_mask, 1, n)
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = _shifted(positions, n, packed)
        if _cached(kwargs):  # the tokens are in the cache already
            return base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if positions is not None:
            first = torch.arange(n, device=positions.device).expand(len(positions), n)
            kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], dim=1)
        for name, value in (("token_type_ids", 0), ("labels", -100)):
            given = kwargs.get(name)
            if given is not None and given.shape == input_ids.shape:
                kwargs[name] = _prepend(given, value, n)
        self._take_place(base, n)
        try:
            out = base(input_ids=_prepend(input_ids, tokens.placeholder, n), attention_mask=attention_mask, **kwargs)
        finally:
            tokens.at = None
        return out if tokens.decoder else _cut(out, n, length)

    def _take_place(self, base: Base, n: int) -> None:
        """At the very start; tokens of adapters stacked around this one move on."""
        for graft in base.site.chain:
            if isinstance(graft, InsertGraft) and graft.owner[0].at is not None:
                graft.owner[0].at += n
        self.owner[0].at = 0


class ReplaceGraft(_TokenGraft):
    """Around the embedding: puts the virtual tokens where their placeholders are."""

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B, n + T) -> (B, n + T, d)
        embedded, tokens = base(ids), self.owner[0]
        if tokens.at is None:
            return embedded
        before, after = embedded[:, : tokens.at], embedded[:, tokens.at + tokens.count :]
        virtual = tokens.embed(after).to(embedded.dtype).expand(len(ids), -1, -1)
        return torch.cat([before, virtual, after], dim=1)


class AttendGraft(_TokenGraft):
    """Around a decoder: lets it attend to the virtual tokens among the encoder's outputs."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs["encoder_attention_mask"] = _prepend(mask, 1, self.owner[0].count)
        return base(*args, **kwargs)


class ApartGraft(_TokenGraft):
    """Around an encoder-decoder: rows of different tokens run apart from here on, since their lengths differ."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        out, n = base(*args, **kwargs), self.owner[0].count
        encoded = out.get("encoder_last_hidden_state")
        if encoded is not None:
            out["encoder_last_hidden_state"] = encoded[:, n:]
        return out


def _prepend(values: Tensor, value: int, n: int) -> Tensor:
    if values.ndim != 2:
        raise ModelError(f"virtual tokens extend masks of shape (rows, tokens), got {tuple(values.shape)}")
    return torch.cat([values.new_full((len(values), n), value), values], dim=1)


def _shifted(positions: Tensor, n: int, packed: bool) -> Tensor:
    if packed and (positions.diff(dim=1) < 0).any():
        raise ModelError("virtual tokens cannot go before each example of a packed row; turn packing off")
    return positions + n


def _cached(kwargs: Mapping[str, Any]) -> bool:
    """Whether a key-value cache holds tokens; transformers calls it `cache`, at first `past_key_values`."""
    caches = [kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    return any(cache.get_seq_length() for cache in caches)


def _cut(out: Any, n: int, length: int) -> Any:
    for name in ("logits", "last_hidden_state"):
        value = out.get(name) if isinstance(out, dict) else None
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == n + length:
            out[name] = value[:, n:]
    return out


def _stacks(model: Any) -> list[str]:
    """Paths of encoder and decoder, where the model has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(model.get_encoder())], paths[id(model.get_decoder())]]
