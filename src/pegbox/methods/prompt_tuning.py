"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021), arXiv:2104.08691.

    the model reads  [p_1 .. p_n, e(x_1) .. e(x_T)]        p: (n, d), e: the frozen embedding

Positions, masks and labels are extended, and the outputs of the n virtual tokens are cut off again, so that the tuned
model has the shapes of the base.  Placeholder ids take the virtual tokens' places, so that whatever a model reads off
its ids (padding, positions, the last token to classify) stays right; their embeddings are then replaced.

p starts as embeddings of ids drawn from the vocabulary, the better of the paper's simple starts; HF PEFT's default is
a normal draw.  An encoder-decoder gets its prompt before the encoder's tokens, as in the paper, and its decoder
attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Graft, Method, PeftLayout, Site, Traits, setting
from pegbox.core.errors import ModelError


class Prompt(nn.Module):
    """The virtual tokens of one adapter, where they are to go in the ids now under way, and who attends to them."""

    def __init__(self, start: Tensor, placeholder: int, decoder: str | None) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start)  # (n, d)
        self.placeholder, self.decoder = placeholder, decoder
        self.at: int | None = None


class InsertGraft(Graft):
    """Around the model, or its encoder: makes room at the start of every row, and cuts a model's outputs there off."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.owner = (prompt,)  # shared, so not registered here

    def forward(
        self, base: Base, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if input_ids is None:
            raise ModelError("prompt_tuning puts its tokens before input_ids, and the model was called without any")
        prompt, length = self.owner[0], input_ids.shape[1]
        n = len(prompt.prompt)
        packed = attention_mask is None
        attention_mask = None if attention_mask is None else _prepend(attention_mask, 1, n)
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = _shifted(positions, n, packed)
        if _cached(kwargs):  # the prompt is in the cache already
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
            out = base(input_ids=_prepend(input_ids, prompt.placeholder, n), attention_mask=attention_mask, **kwargs)
        finally:
            prompt.at = None
        return out if prompt.decoder else _cut(out, n, length)

    def _take_place(self, base: Base, n: int) -> None:
        """At the very start; prompts of adapters stacked around this one move on."""
        for graft in base.site.chain:
            if isinstance(graft, InsertGraft) and graft.owner[0].at is not None:
                graft.owner[0].at += n
        self.owner[0].at = 0


class ReplaceGraft(Graft):
    """Around the embedding: puts the virtual tokens where their placeholders are."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.owner = (prompt,)

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B, n + T) -> (B, n + T, d)
        embedded, prompt = base(ids), self.owner[0]
        if prompt.at is None:
            return embedded
        before, after = embedded[:, : prompt.at], embedded[:, prompt.at + len(prompt.prompt) :]
        virtual = prompt.prompt.to(embedded.dtype).expand(len(ids), -1, -1)
        return torch.cat([before, virtual, after], dim=1)


class AttendGraft(Graft):
    """Around a decoder: lets it attend to the virtual tokens among the encoder's outputs."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.owner = (prompt,)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs["encoder_attention_mask"] = _prepend(mask, 1, len(self.owner[0].prompt))
        return base(*args, **kwargs)


class ApartGraft(Graft):
    """Around an encoder-decoder: rows of different prompts run apart from here on, since their lengths differ."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.owner = (prompt,)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        out, n = base(*args, **kwargs), len(self.owner[0].prompt)
        encoded = out.get("encoder_last_hidden_state")
        if encoded is not None:
            out["encoder_last_hidden_state"] = encoded[:, n:]
        return out


def _prepend(values: Tensor, value: int, n: int) -> Tensor:
    if values.ndim != 2:
        raise ModelError(f"prompt_tuning extends masks of shape (rows, tokens), got {tuple(values.shape)}")
    return torch.cat([values.new_full((len(values), n), value), values], dim=1)


def _shifted(positions: Tensor, n: int, packed: bool) -> Tensor:
    if packed and (positions.diff(dim=1) < 0).any():
        raise ModelError("prompt_tuning cannot put a prompt before each example of a packed row; turn packing off")
    return positions + n


def _cached(kwargs: Mapping[str, Any]) -> bool:
    """Whether a key-value cache holds tokens; transformers calls it `cache`, before 5.20 `past_key_values`."""
    caches = [kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    return any(cache.get_seq_length() for cache in caches)


def _cut(out: Any, n: int, length: int) -> Any:
    for name in ("logits", "last_hidden_state"):
        value = out.get(name) if isinstance(out, dict) else None
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == n + length:
            out[name] = value[:, n:]
    return out


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    targets: str | tuple[str, ...] = setting("embed", "the embedding that the virtual tokens join")
    tokens: int = setting(20, "virtual tokens before every input", at_least=1)
    start: Literal["vocabulary", "random"] = setting("vocabulary", "draw the start from the embeddings, or N(0, 1)")

    traits: ClassVar[Traits] = Traits(
        seams=("tokens",),
        card="peft-unit-tests",
        identity=False,
        merge="no",
        needs=("token ids",),
        peft=PeftLayout(
            "PROMPT_TUNING", tensors={"prompt": "prompt_embeddings"}, fields={"tokens": "num_virtual_tokens"}
        ),
    )
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        embed = super().sites(model, anatomy)[0]
        return ["", *_stacks(model), embed]

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Prompt:
        table: Tensor = model.get_submodule(self.sites(model, anatomy)[-1]).weight  # type: ignore[assignment]
        rows, width = table.shape
        if self.start == "random":
            start = torch.randn(self.tokens, width)
        else:
            start = table[torch.randint(rows, (self.tokens,)).to(table.device)].detach().float().clone()
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        decoder = _stacks(model)[-1] if _stacks(model) else None
        return Prompt(start.to(table.device), placeholder=1 if pad == 0 else 0, decoder=decoder)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Prompt)
        if isinstance(site.module, nn.Embedding):
            return ReplaceGraft(shared)
        if site.path == shared.decoder:
            return AttendGraft(shared)
        return ApartGraft(shared) if shared.decoder and site.path == "" else InsertGraft(shared)

    def size(self, site: Site) -> int:
        return self.tokens * site.shape[1] if isinstance(site.module, nn.Embedding) else 0

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        config: Any = getattr(model, "config", None)
        if config is None:
            return {}
        return {
            "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }


def _stacks(model: Any) -> list[str]:
    """Paths of encoder and decoder, where the model has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(model.get_encoder())], paths[id(model.get_decoder())]]
