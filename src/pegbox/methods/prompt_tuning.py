"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021), arXiv:2104.08691.

    the model reads  [p_1 .. p_n, e(x_1) .. e(x_T)]        p: (n, d), e: the frozen embedding

p starts as embeddings of ids drawn from the vocabulary, the better of the paper's simple starts, scaled where the model
scales its own (Gemma, BART); HF PEFT's default is a normal draw.  An encoder-decoder gets its prompt before the
encoder's tokens, as in the paper, and its decoder attends to it.  HF PEFT keeps as many tokens again for the decoder
(`num_transformer_submodules=2`, its default there), which it never reads; from such a file the encoder's are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pegbox.core import (
    Anatomy,
    Graft,
    Method,
    PeftLayout,
    Site,
    Traits,
    VirtualTokens,
    encoder_half,
    own_embeddings,
    setting,
    token_graft,
    token_peft,
    token_sites,
)


class Prompt(VirtualTokens):
    def __init__(self, model: nn.Module, start: Tensor) -> None:
        super().__init__(model, len(start))
        self.prompt = nn.Parameter(start)  # (n, d)

    def embed(self, embedded: Tensor) -> Tensor:
        return self.prompt


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
        packs=False,
        needs=("token ids",),
        peft=PeftLayout(
            "PROMPT_TUNING", tensors={"prompt": "prompt_embeddings"}, fields={"tokens": "num_virtual_tokens"}
        ),
    )
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return token_sites(model, super().sites(model, anatomy)[0])

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Prompt:
        table: Any = model.get_submodule(self.sites(model, anatomy)[-1])
        if self.start == "random":
            return Prompt(model, torch.randn(self.tokens, table.embedding_dim).to(table.weight.device))
        drawn = torch.randint(table.num_embeddings, (self.tokens,)).to(table.weight.device)
        return Prompt(model, own_embeddings(table, drawn).float())

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Prompt)
        return token_graft(site, shared)

    def size(self, site: Site) -> int:
        return self.tokens * site.module.embedding_dim if isinstance(site.module, nn.Embedding) else 0

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return encoder_half(tensors, own)

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        return token_peft(model) | {"prompt_tuning_init": "RANDOM"}
