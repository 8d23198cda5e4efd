"""The seam for virtual tokens: trained vectors that a model reads before every input.

    the model reads  [v_1 .. v_n, e(x_1) .. e(x_T)]        v: (n, d), e: the frozen embedding

Positions, masks and labels are extended, and the outputs at the n virtual tokens are cut off again, so that the tuned
model has the shapes of the base.  Placeholder ids take the virtual tokens' places, so that whatever a model reads off
its ids (padding, positions, the last token to classify) stays right; their embeddings are then replaced.  With a
key-value cache they are read once.  An encoder-decoder gets them before the encoder's tokens, and its decoder attends
to them.  Stacked adapters' tokens follow one another, those of the first adapter first.

Rows of different adapters go through a model that writes text in one pass, the shorter ones padded at the left, so
that they share a cache; through any other model in groups.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import ModelError, TargetError
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
        self.decoder = decoder_path(model)
        self.writes = _writes(model)
        self.at: int | None = None  # where they go in the ids now under way

    @abstractmethod
    def embed(self, embedded: Tensor) -> Tensor:
        """The virtual tokens (n, d), or (B, n, d), before the embedded input (B, T, d)."""


def token_sites(model: nn.Module, embedding: str) -> list[str]:
    """The sites of a method of virtual tokens: the model, its encoder and decoder if it has both, the embedding.

    Raises:
        TargetError: the model, or its encoder, reads no token ids.
    """
    stacks = _stacks(model)
    reader = model.get_submodule(stacks[0]) if stacks else model
    takes = list(inspect.signature(reader.forward).parameters)
    if "input_ids" not in takes:
        raise TargetError(
            f"virtual tokens go before input_ids, and {type(reader).__name__} takes {', '.join(takes[:4])}"
        )
    return ["", *stacks, embedding]


def token_graft(site: Site, tokens: VirtualTokens) -> Graft:
    """What runs around one of `token_sites`."""
    if isinstance(site.module, nn.Embedding):
        return ReplaceGraft(tokens)
    if site.path == tokens.decoder:
        return AttendGraft(tokens)
    return ApartGraft(tokens) if tokens.decoder and site.path == "" else InsertGraft(tokens)


@torch.no_grad()
def own_embeddings(table: nn.Embedding, ids: Tensor) -> Tensor:
    """What the base's embedding gives for ids (n,), scaled where it scales: (n, d)."""
    # by the class, since in the place of the instance's forward stand the grafts of adapters that are there already
    embedded: Tensor = type(table).forward(table, ids)
    return embedded


def token_peft(model: nn.Module) -> dict[str, Any]:
    """What HF PEFT's configuration of virtual tokens says of the model."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    return {
        "token_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
    }


def encoder_half(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prompt of HF PEFT's file as an adapter's own: (n, d) as it is, and of (2n, d) the first n.

    For an encoder-decoder PEFT keeps tokens for both (`num_transformer_submodules=2`), and reads the encoder's alone.
    """
    prompt = tensors.get("prompt")
    if prompt is None:
        return {}
    want = own["prompt"].shape
    return {"prompt": prompt[: want[0]] if prompt.shape == (2 * want[0], want[1]) else prompt}


class OpeningGraft(Graft):
    """Around a model: what an adapter puts before the text of every row.

    Args:
        inserts: positions that it makes room for.
        moves: how far on the text's positions begin; an adapter may move them without making room.
    """

    sums = False

    def __init__(self, inserts: int, moves: int) -> None:
        super().__init__()
        self.inserts, self.moves = inserts, moves

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        writes = all(g.tokens.writes for g in grafts if isinstance(g, InsertGraft))
        return OpeningRows(grafts) if writes and alike(grafts, OpeningGraft) else None


class InsertGraft(OpeningGraft):
    """Around the model, or its encoder: makes room at the start of every row, and cuts a model's outputs there off."""

    def __init__(self, tokens: VirtualTokens) -> None:
        super().__init__(inserts=tokens.count, moves=tokens.count)
        self.owner = (tokens,)  # shared, so not registered here

    @property
    def tokens(self) -> VirtualTokens:
        return self.owner[0]

    def forward(
        self, base: Base, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        ids, n = _required(input_ids), self.inserts
        packed = attention_mask is None
        attention_mask = None if attention_mask is None else _prepend(attention_mask, 1, n)
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = _shifted(positions, n, packed)
        if cached_length(kwargs):  # the tokens are in the cache already
            return base(input_ids=ids, attention_mask=attention_mask, **kwargs)
        if positions is not None:
            first = torch.arange(n, device=positions.device).expand(len(positions), n)
            kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], dim=1)
        self._take_place(base, n)
        try:
            return _with_room(base, ids, attention_mask, kwargs, n, self.tokens)
        finally:
            self.tokens.at = None

    def _take_place(self, base: Base, n: int) -> None:
        """At the very start; tokens of adapters stacked around this one move on."""
        for graft in base.site.chain:
            if isinstance(graft, InsertGraft) and graft.tokens.at is not None:
                graft.tokens.at += n
        self.tokens.at = 0


class OpeningRows(Graft):
    """The same for rows that differ in it, in one pass: room for the longest, the others padded there."""

    def __init__(self, grafts: Sequence[Graft | None]) -> None:
        super().__init__()
        self.inserts = [g.inserts if isinstance(g, OpeningGraft) else 0 for g in grafts]
        self.moves = [g.moves if isinstance(g, OpeningGraft) else 0 for g in grafts]
        self.tokens = [g.tokens for g in dict.fromkeys(grafts) if isinstance(g, InsertGraft)]

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(base.site.__signature__.parameters, args, strict=False)) | kwargs
        if not self.tokens:
            return base(**self._moved(base, named))
        ids, n = _required(named.pop("input_ids", None)), max(self.inserts)
        length = cached_length(named)
        past = max(length - n, 0)  # of the text
        mask = named.pop("attention_mask", None)
        if mask is None:
            _shifted(named.get("position_ids"), 0, packed=True)
            mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device)
        _check_mask(mask)
        mask = torch.cat([right_aligned(self.inserts, n, ids.device).to(mask.dtype), mask], dim=1)
        named = self._moved(base, named | {"input_ids": ids})
        if length:
            return base(**(named | {"attention_mask": mask}))
        if named.get("position_ids") is not None:
            named["position_ids"] = torch.cat([self._first(n, ids.device), named["position_ids"]], dim=1)
        return self._opened(base, named, mask, n)

    def _moved(self, base: Base, named: dict[str, Any]) -> dict[str, Any]:
        """With the positions (B, T) of every row's text, where the model takes any."""
        if "position_ids" not in base.site.__signature__.parameters:
            return named
        positions, n = named.get("position_ids"), max(self.inserts)
        if positions is None:
            positions = text_positions(named, n)
        by = torch.tensor(self.moves, device=positions.device)[:, None]
        return named | {"position_ids": positions + by}

    def _first(self, n: int, device: torch.device) -> Tensor:
        """(B, n): positions of what comes before the text."""
        missing = torch.tensor([n - count for count in self.inserts], device=device)
        return (torch.arange(n, device=device) - missing[:, None]).clamp_min(0)

    def _opened(self, base: Base, named: dict[str, Any], mask: Tensor, n: int) -> Any:
        context = base.site.context
        before, context.padding = context.padding, tuple(n - count for count in self.inserts)
        for tokens in self.tokens:
            tokens.at = n - tokens.count
        try:
            return _with_room(base, named.pop("input_ids"), mask, named, n, self.tokens[0])
        finally:
            context.padding = before
            for tokens in self.tokens:
                tokens.at = None


def _with_room(
    base: Base, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any], n: int, tokens: VirtualTokens
) -> Any:
    """Run a model on ids (B, T) with n placeholders before them, and cut its outputs there off."""
    for name, value in (("token_type_ids", 0), ("labels", -100)):
        given = kwargs.get(name)
        if given is not None and given.shape == ids.shape:
            kwargs[name] = _prepend(given, value, n)
    out = base(input_ids=_prepend(ids, tokens.placeholder, n), attention_mask=mask, **kwargs)
    return out if tokens.decoder else _cut(out, n, ids.shape[1])


class _TokenGraft(Graft):
    sums = False

    def __init__(self, tokens: VirtualTokens) -> None:
        super().__init__()
        self.owner = (tokens,)  # shared, so not registered here

    @property
    def tokens(self) -> VirtualTokens:
        return self.owner[0]


class ReplaceGraft(_TokenGraft):
    """Around the embedding: puts the virtual tokens where their placeholders are."""

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B, n + T) -> (B, n + T, d)
        embedded, tokens = base(ids), self.tokens
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
            kwargs["encoder_attention_mask"] = _prepend(mask, 1, self.tokens.count)
        return base(*args, **kwargs)

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        return AttendRows(_counts(grafts)) if alike(grafts, cls) else None


class AttendRows(Graft):
    """The same for rows that differ in it: each attends to its own, not to what pads them."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = tuple(counts)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        encoded, mask, n = kwargs["encoder_hidden_states"], kwargs.get("encoder_attention_mask"), max(self.counts)
        if mask is None:
            mask = torch.ones(len(encoded), encoded.shape[1] - n, dtype=torch.long, device=encoded.device)
        _check_mask(mask)
        own = right_aligned(self.counts, n, mask.device).to(mask.dtype)
        kwargs["encoder_attention_mask"] = torch.cat([own, mask], dim=1)
        return base(*args, **kwargs)


class ApartGraft(_TokenGraft):
    """Around an encoder-decoder: cuts off what its encoder gives for the virtual tokens."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return _cut_encoded(base(*args, **kwargs), self.tokens.count)

    @classmethod
    def of_rows(cls, grafts: Sequence[Graft | None]) -> Graft | None:
        return ApartRows(max(_counts(grafts))) if alike(grafts, cls) else None


class ApartRows(Graft):
    """The same for rows that differ in it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return _cut_encoded(base(*args, **kwargs), self.count)


def alike(grafts: Sequence[Graft | None], cls: type[Graft]) -> bool:
    """Whether all grafts of a site's rows are of a class."""
    return all(g is None or isinstance(g, cls) for g in grafts)


def _counts(grafts: Sequence[Graft | None]) -> list[int]:
    """Virtual tokens of each row."""
    return [g.tokens.count if isinstance(g, _TokenGraft) else 0 for g in grafts]


def right_aligned(counts: Sequence[int], n: int, device: torch.device) -> Tensor:
    """(B, n), boolean: the last `counts[i]` of row i."""
    missing = torch.tensor([n - count for count in counts], device=device)
    return torch.arange(n, device=device) >= missing[:, None]


def text_positions(named: Mapping[str, Any], inserted: int = 0) -> Tensor:
    """(1, T): the positions that a decoder gives its tokens where it is told none.

    Args:
        named: the decoder's arguments.
        inserted: what the cache holds before the text.
    """
    text = next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)
    if text is None:
        raise ModelError("a prefix goes before input_ids or inputs_embeds, and the model was called without either")
    past = max(cached_length(named) - inserted, 0)
    return torch.arange(past, past + text.shape[1], device=text.device)[None]


def cached_length(kwargs: Mapping[str, Any]) -> int:
    """Positions that the key-value cache holds; transformers calls it `cache`, at first `past_key_values`."""
    for name in ("cache", "past_key_values"):
        cache = kwargs.get(name)
        if cache is not None:
            length: int = cache.get_seq_length()
            return length
    return 0


def _required(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ModelError("virtual tokens go before input_ids, and the model was called without any")
    return ids


def _check_mask(values: Tensor) -> None:
    if values.ndim != 2:
        raise ModelError(f"virtual tokens extend masks of shape (rows, tokens), got {tuple(values.shape)}")


def _prepend(values: Tensor, value: int, n: int) -> Tensor:
    _check_mask(values)
    return torch.cat([values.new_full((len(values), n), value), values], dim=1)


def _shifted(positions: Any, n: int, packed: bool) -> Any:
    if packed and positions is not None and (positions.diff(dim=1) < 0).any():
        raise ModelError("virtual tokens cannot go before each example of a packed row; turn packing off")
    return None if positions is None else positions + n


def _cut(out: Any, n: int, length: int) -> Any:
    for name in ("logits", "last_hidden_state"):
        value = out.get(name) if isinstance(out, dict) else None
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == n + length:
            out[name] = value[:, n:]
    return out


def _cut_encoded(out: Any, n: int) -> Any:
    encoded = out.get("encoder_last_hidden_state")
    if encoded is not None:
        out["encoder_last_hidden_state"] = encoded[:, n:]
    return out


def _stacks(model: Any) -> list[str]:
    """Paths of encoder and decoder, where the model has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(model.get_encoder())], paths[id(model.get_decoder())]]


def decoder_path(model: nn.Module) -> str | None:
    """Where the decoder of an encoder-decoder is; None for any other model."""
    return next(reversed(_stacks(model)), None)


def _writes(model: Any) -> bool:
    """Whether the model writes text, by transformers' own word."""
    says = getattr(model, "can_generate", None)
    return bool(says and says())
