"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021), arXiv:2104.08691.

    the model reads  [p_1 .. p_n, e(x_1) .. e(x_T)]        p: (n, d), e: the frozen embedding

Positions, masks and labels are extended, and the outputs of the n virtual tokens are cut off again, so that the tuned
model has the shapes of the base.  Placeholder ids take the virtual tokens' places, so that whatever a model reads off
its ids (padding, positions, the last token to classify) stays right; their embeddings are then replaced.

p starts as embeddings of ids drawn from the vocabulary, the better of the paper's simple starts; HF PEFT's default is
a normal draw.  An encoder-decoder gets its prompt before the encoder's tokens, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import Anatomy, Base, Graft, Method, PeftLayout, Site, Traits, setting
from pegbox.core.errors import ModelError


class Prompt(nn.Module):
    """The virtual tokens of one adapter, and whether the ids now under way have places for them."""

    def __init__(self, start: Tensor, placeholder: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start)  # (n, d)
        self.placeholder, self.waiting = placeholder, False


class InsertGraft(Graft):
    """Around the whole model: makes room at the start of every row, and cuts the outputs there off."""

    def __init__(self, prompt: Prompt, decoder_only: bool) -> None:
        super().__init__()
        self.owner = (prompt,)  # shared, so not registered here
        self.decoder_only = decoder_only

    def forward(self, base: Base, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        prompt = self.owner[0]
        n, (batch, length) = len(prompt.prompt), input_ids.shape
        if attention_mask is not None:
            attention_mask = _prepend(attention_mask, 1, n)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = _shifted(positions, n)
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers renamed it in 5.24
        if past is not None and past.get_seq_length():  # the prompt is in the cache already
            return base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if positions is not None:
            first = torch.arange(n, device=positions.device).expand(batch, n)
            kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], dim=1)
        for name, value in (("token_type_ids", 0), ("labels", -100)):
            given = kwargs.get(name)
            if given is not None and given.shape == input_ids.shape and (self.decoder_only or name != "labels"):
                kwargs[name] = _prepend(given, value, n)
        prompt.waiting = True
        out = base(input_ids=_prepend(input_ids, prompt.placeholder, n), attention_mask=attention_mask, **kwargs)
        return _cut(out, n, length)


class ReplaceGraft(Graft):
    """Around the embedding: puts the virtual tokens where the placeholders are."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.owner = (prompt,)

    def forward(self, base: Base, ids: Tensor) -> Tensor:  # (B, n + T) -> (B, n + T, d)
        embedded, prompt = base(ids), self.owner[0]
        if not prompt.waiting:
            return embedded
        prompt.waiting = False
        n = len(prompt.prompt)
        virtual = prompt.prompt.to(embedded.dtype).expand(len(ids), -1, -1)
        return torch.cat([virtual, embedded[:, n:]], dim=1)


def _prepend(values: Tensor, value: int, n: int) -> Tensor:
    if values.ndim != 2:
        raise ModelError(f"prompt_tuning extends masks of shape (rows, tokens), got {tuple(values.shape)}")
    return torch.cat([values.new_full((len(values), n), value), values], dim=1)


def _shifted(positions: Tensor, n: int) -> Tensor:
    if (positions.diff(dim=1) < 0).any():
        raise ModelError("prompt_tuning cannot put a prompt before each example of a packed row; turn packing off")
    return positions + n


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
        return ["", super().sites(model, anatomy)[0]]

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Prompt:
        table: Tensor = model.get_submodule(self.sites(model, anatomy)[1]).weight  # type: ignore[assignment]
        rows, width = table.shape
        if self.start == "random":
            start = torch.randn(self.tokens, width)
        else:
            start = table[torch.randint(rows, (self.tokens,)).to(table.device)].detach().float().clone()
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        return Prompt(start.to(table.device), placeholder=1 if pad == 0 else 0)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Prompt)
        if site.path:
            return ReplaceGraft(shared)
        config = getattr(site.module, "config", None)
        return InsertGraft(shared, decoder_only=not getattr(config, "is_encoder_decoder", False))

    def size(self, site: Site) -> int:
        return 0 if site.path == "" else self.tokens * site.shape[1]

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        config: Any = model.config
        return {
            "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
