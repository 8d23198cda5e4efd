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
from pegbox.checks import kinds, models
from pegbox.checks.case import small
from pegbox.checks.check import require
from pegbox.checks.lab import bits, logits, require_close, require_same_bits, shake
from pegbox.checks.models import Batch
from pegbox.core.errors import PegboxError
from pegbox.core.method import Method
from pegbox.core.settings import build
from pegbox.core.tuned import Tuned

WIDTH, WIDE = 16, 64  # the second where a quantised format wants blocks of 64
ON_SITES = {"weight", "output", "selection"}  # the seams that act on a site; the others do on a whole model


@dataclass(frozen=True)
class Place:
    """A kind of site in a small model.

    Attributes:
        name: as the table's column has it.
        build: the model.
        batch: of a seed, for its forward.
        targets: what a method is told.
        package: that brings the storage.
        rounding: how far the site's own forward may be from computing with its matrix.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    targets: str
    package: str | None = None
    rounding: float = 1e-5

    def output(self, model: nn.Module) -> Tensor:
        return logits(model(**models.inputs(self.batch(0))))


def _drawn(*shape: int) -> Callable[[int], Batch]:
    """Batches of normal values."""
    return lambda seed: {"x": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def _ids(seed: int) -> Batch:
    return {"x": torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(seed))}


def _linear(width: int) -> nn.Module:
    return kinds.Only(nn.Linear(width, width))


PLACES = (
    Place("Linear", lambda: _linear(WIDTH), _drawn(3, 5, WIDTH), "site"),
    Place("Conv1D (transformers)", lambda: kinds.Only(kinds.conv1d(WIDTH)), _drawn(3, 5, WIDTH), "site"),
    Place("Conv2d", lambda: kinds.Only(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), _drawn(3, WIDTH, 5, 4), "site"),
    Place("Embedding", lambda: kinds.Only(nn.Embedding(12, WIDTH)), _ids, "site"),
    Place("rows of a fused matrix", models.gpt2, models.text, "attn.q"),
    Place("experts", models.mixture, models.text, "experts.down_proj"),
    Place("MultiheadAttention", lambda: kinds.Attention(WIDTH), _drawn(3, 5, WIDTH), "in_proj_weight"),
    Place("Linear, nf4", lambda: kinds.nf4(_linear(WIDE)), _drawn(3, 5, WIDE), "site", "bitsandbytes"),
    Place("Linear, int8", lambda: kinds.int8(_linear(WIDE)), _drawn(3, 5, WIDE), "site", "bitsandbytes", 0.05),
    Place("Linear, torchao int8", lambda: kinds.torchao(_linear(WIDE), 8), _drawn(3, 5, WIDE), "site", "torchao"),
    Place("Linear, torchao int4", lambda: kinds.torchao(_linear(WIDE), 4), _drawn(3, 5, WIDE), "site", "torchao"),
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
