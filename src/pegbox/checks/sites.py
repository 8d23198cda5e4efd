"""Which method works on which kind of site, and in which storage: found by trying each."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox import anatomy, methods
from pegbox.checks import kinds
from pegbox.checks.case import small
from pegbox.checks.check import require
from pegbox.checks.lab import bits, logits, require_close, require_same_bits, shake
from pegbox.checks.models import gpt2, text
from pegbox.core.errors import PegboxError
from pegbox.core.method import Method
from pegbox.core.settings import build
from pegbox.core.tuned import Tuned

WIDTH = 16
ON_SITES = {"weight", "output", "selection"}  # the seams that act on a site; the others do on a whole model


@dataclass(frozen=True)
class Place:
    """A kind of site in a small model.

    Attributes:
        name: as the table's column has it.
        build: the model.
        inputs: of its forward.
        targets: what a method is told.
        package: that brings the storage.
        rounding: how far the site's own forward may be from computing with its matrix.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Tensor, ...], dict[str, Tensor]]]
    targets: str
    package: str | None = None
    rounding: float = 1e-5

    def output(self, model: nn.Module) -> Tensor:
        args, kwargs = self.inputs()
        return logits(model(*args, **kwargs))


class Only(nn.Module):
    """One layer and a fixed one after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"site": layer})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers["site"](x)
        return y.tanh()


class Attention(nn.Module):
    """torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return y


def mixture() -> nn.Module:
    """A transformer whose experts keep their matrices in two parameters of one module."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        initializer_range=0.3,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def _features() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)),), {}


def _wide() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)),), {}


def _pixels() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.randn(3, WIDTH, 5, 4, generator=torch.Generator().manual_seed(0)),), {}


def _tokens() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.arange(15).reshape(3, 5) % 12,), {}


def _text() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (), {k: v for k, v in text(0).items() if k != "labels"}


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Only(Conv1D(WIDTH, WIDTH))


def _torchao(word: str) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = Only(nn.Linear(64, 64))
    four = IntxWeightOnlyConfig(torch.int4, PerGroup(32))  # type: ignore[attr-defined]
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False) if word == "int8" else four)
    return model


PLACES = (
    Place("Linear", lambda: Only(nn.Linear(WIDTH, WIDTH)), _features, "site"),
    Place("Conv1D (transformers)", _transposed, _features, "site"),
    Place("Conv2d", lambda: Only(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), _pixels, "site"),
    Place("Embedding", lambda: Only(nn.Embedding(12, WIDTH)), _tokens, "site"),
    Place("rows of a fused matrix", gpt2, _text, "attn.q"),
    Place("experts", mixture, _text, "experts.down_proj"),
    Place("MultiheadAttention", Attention, _features, "in_proj_weight"),
    Place("Linear, nf4", lambda: kinds.nf4(Only(nn.Linear(64, 64))), _wide, "site", "bitsandbytes"),
    Place("Linear, int8", lambda: kinds.int8(Only(nn.Linear(64, 64))), _wide, "site", "bitsandbytes", 0.05),
    Place("Linear, torchao int8", lambda: _torchao("int8"), _wide, "site", "torchao"),
    Place("Linear, torchao int4", lambda: _torchao("int4"), _wide, "site", "torchao"),
)


def on_sites() -> Iterator[type[Method]]:
    """The methods that act on sites, by name."""
    for name in methods.names():
        cls = methods.get(name)
        if ON_SITES & set(cls.traits.seams) and "blocks" not in cls.traits.needs:
            yield cls


def outcome(cls: type[Method], place: Place) -> str | None:
    """Put a method on a site, train, merge, take it off: None if all of it holds, else why the method refused.

    Raises:
        CheckFailed: it neither refused nor worked.
    """
    if place.package and not importlib.util.find_spec(place.package):
        return f"{place.package} is not installed"
    torch.manual_seed(0)
    model = place.build().eval()
    try:
        method = build(cls, small(cls) | _at(cls, place), what=cls.name())
        tuned = Tuned(model, anatomy.of(model), method).eval()
    except PegboxError as refused:
        return str(refused).partition("\n")[0]
    _works(tuned, method, place)
    return None


def _at(cls: type[Method], place: Place) -> dict[str, Any]:
    """The place as targets, and nothing for other settings that name sites by their roles."""
    lists = {f.name: () for f in dataclasses.fields(cls) if f.type == "str | tuple[str, ...]"}
    return {**lists, "targets": place.targets}


def _works(tuned: Tuned, method: Method, place: Place) -> None:
    what, before = f"{method.name()} on {place.name}", bits(tuned.model)
    shake(tuned)
    place.output(tuned).square().sum().backward()
    dead = [key for key, p in tuned.trainable().items() if p.grad is None or not p.grad.isfinite().all()]
    require(not dead, f"{what}: {dead[:1]} gets no gradient")
    with torch.no_grad():
        want = place.output(tuned)
        if method.traits.merge == "exact":
            require_close(
                place.output(tuned.merge()), want, f"{what}: merged", max(1e-5, _merge_rounding(tuned, place))
            )
            tuned.unmerge()
    if method.traits.keeps_base:
        require_same_bits(bits(tuned.detach()), before, what)


def _merge_rounding(tuned: Tuned, place: Place) -> float:
    """A graft that leaves a rounding matrix to the base keeps its rounding until it is merged."""
    maps: set[Any] = {parameter for site in tuned.sites.values() for graft in site.chain for parameter in graft.maps}
    return 0.0 if "weight" in maps else place.rounding
