"""P-tuning: GPT Understands, Too (Liu et al., 2021), arXiv:2103.10385.

    the model reads  [p_1 .. p_n, e(x_1) .. e(x_T)]        e: the frozen embedding
    p = f(E)        E: (n, d), trained with f
    f = MLP(BiLSTM(E))        the paper's: Linear, ReLU, Linear after `lstm_layers` of LSTM, h units each way
    f = MLP(E)                Linear(d, h), ReLU, Linear(h, h), ReLU, Linear(h, d), HF PEFT's default and the one here

The paper lets virtual tokens stand between those of the text, by a template for each task; here, as in HF PEFT, they
stand before it.  Once trained, only p is needed: then this is prompt tuning.  The file holds both p, which is all that
HF PEFT keeps and reads, and E and f, so that training can go on.  A file of PEFT's, whose E and f are lost, loads with
`encoder="none"`: p itself, to be used or trained on as in prompt tuning.
E is drawn from N(0, 1), the layers as torch draws its own, as in HF PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Anatomy, Graft, Method, PeftLayout, Site, Traits, VirtualTokens, setting
from pegbox.core.errors import AdapterError
from pegbox.core.tokens import encoder_half, token_graft, token_peft, token_sites


class EncodedPrompt(VirtualTokens):
    """E and f; the tensors of f are named as torch names them, `lstm_` and `mlp_` before."""

    def __init__(self, model: nn.Module, width: int, method: PTuning) -> None:
        super().__init__(model, method.tokens)
        self.layers, self.dropout = method.lstm_layers, method.lstm_dropout
        self.embedding = nn.Parameter(torch.randn(method.tokens, width))  # (n, d)
        for name, tensor in _drawn(method, width).items():
            self.register_parameter(name, nn.Parameter(tensor.detach()))

    def embed(self, embedded: Tensor) -> Tensor:
        return encoded(dict(self.named_parameters()), self.layers, self.dropout if self.training else 0.0)


class Prompt(VirtualTokens):
    """p itself."""

    def __init__(self, model: nn.Module, width: int, method: PTuning) -> None:
        super().__init__(model, method.tokens)
        self.prompt = nn.Parameter(torch.randn(method.tokens, width))  # (n, d)

    def embed(self, embedded: Tensor) -> Tensor:
        return self.prompt


def _drawn(method: PTuning, width: int) -> dict[str, Tensor]:
    hidden = method.hidden or width
    if method.encoder == "lstm":
        lstm: nn.Module = nn.LSTM(width, hidden, method.lstm_layers, bidirectional=True)
        linears = [nn.Linear(2 * hidden, 2 * hidden), nn.Linear(2 * hidden, width)]
    else:
        lstm = nn.Identity()
        linears = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)]
    drawn: dict[str, Tensor] = {f"lstm_{name}": p for name, p in lstm.named_parameters()}
    return drawn | {f"mlp_{name}_{i}": p for i, linear in enumerate(linears) for name, p in linear.named_parameters()}


def encoded(tensors: Mapping[str, Tensor], layers: int, dropout: float = 0.0) -> Tensor:
    """p (n, d) = f(E), by the names of `EncodedPrompt`."""
    h = tensors["embedding"]
    lstm = [t for name, t in tensors.items() if name.startswith("lstm_")]
    if lstm:
        state = h.new_zeros(2 * layers, 1, lstm[1].shape[1])  # of both ways of each layer, for one row
        h = torch.lstm(h[None], (state, state), lstm, True, layers, dropout, dropout > 0, True, True)[0][0]
    last = sum(name.startswith("mlp_weight") for name in tensors) - 1
    for i in range(last + 1):
        h = F.linear(h if i == 0 else F.relu(h), tensors[f"mlp_weight_{i}"], tensors[f"mlp_bias_{i}"])
    return h


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    targets: str | tuple[str, ...] = setting("embed", "the embedding that the virtual tokens join")
    tokens: int = setting(20, "virtual tokens before every input", at_least=1)
    encoder: Literal["mlp", "lstm", "none"] = setting("mlp", "what makes the virtual tokens; none: they are trained")
    hidden: int = setting(0, "width inside the encoder; 0 for that of the embedding", at_least=0)
    lstm_layers: int = setting(2, "layers of the LSTM", at_least=1)
    lstm_dropout: float = setting(0.0, "share dropped between them while training", at_least=0, below=1)

    traits: ClassVar[Traits] = Traits(
        seams=("tokens",),
        identity=False,
        merge="no",
        packs=False,
        needs=("token ids",),
        peft=PeftLayout(
            "P_TUNING",
            tensors={"prompt": "prompt_embeddings"},
            fields={
                "tokens": "num_virtual_tokens",
                "lstm_layers": "encoder_num_layers",
                "lstm_dropout": "encoder_dropout",
            },
        ),
    )
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return token_sites(model, super().sites(model, anatomy)[0])

    def shared(self, model: nn.Module, anatomy: Anatomy) -> VirtualTokens:
        table: Any = model.get_submodule(self.sites(model, anatomy)[-1])
        kind = Prompt if self.encoder == "none" else EncodedPrompt
        return kind(model, table.embedding_dim, self).to(table.weight.device)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, VirtualTokens)
        return token_graft(site, shared)

    def size(self, site: Site) -> int:
        if not isinstance(site.module, nn.Embedding):
            return 0
        d = site.module.embedding_dim
        h, tokens = self.hidden or d, self.tokens * d
        if self.encoder == "none":
            return tokens
        if self.encoder == "mlp":
            return tokens + (d + 1) * h + (h + 1) * h + (h + 1) * d
        lstm = 2 * sum(4 * h * (wide + h + 2) for wide in (d, *(self.lstm_layers - 1) * (2 * h,)))
        return tokens + lstm + (2 * h + 1) * 2 * h + (2 * h + 1) * d

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder == "none":
            return dict(tensors)
        return dict(tensors) | {"prompt": encoded(tensors, self.lstm_layers)}

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder == "none":
            return encoder_half(tensors, own)
        if "prompt" not in tensors or tensors["prompt"].shape != own["embedding"].shape:
            raise AdapterError("the file lacks the virtual tokens that its encoder gives, or has others")
        return {}  # made anew of the rest

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        said, kind = token_peft(model), "LSTM" if self.encoder == "lstm" else "MLP"
        hidden = self.hidden or said.get("token_dim")
        return said | {"encoder_reparameterization_type": kind, "encoder_hidden_size": hidden}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder": "none"}
