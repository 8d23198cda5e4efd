"""A method: a published way to fine-tune, as a frozen dataclass of its settings.

A subclass overrides the verbs its paper uses; the rest are no-ops.  It declares its traits once, and the registry,
the docs, the command line and the conformance suite read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from pegbox.core.settings import setting
from pegbox.core.site import MATRIX, Site

if TYPE_CHECKING:
    from pegbox.core.graft import Graft
    from pegbox.core.tuned import Tuned

Seam = Literal["weight", "output", "tokens", "taps", "skips", "selection", "mixture", "update", "time"]


class Anatomy(Protocol):
    """What a method may ask of a model's structure; `pegbox.anatomy` provides it."""

    @property
    def blocks(self) -> list[str]:
        """Paths of the repeated blocks, in depth order."""

    def role(self, name: str) -> list[str]:
        """Paths of the modules in a role."""

    def resolve(
        self,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        layers: str | None = None,
        kinds: tuple[type[nn.Module], ...] = MATRIX,
        who: str = "this method",
    ) -> list[str]:
        """Paths that a target names; TargetError if it, or a part of it, names nothing."""


@dataclass(frozen=True)
class PeftLayout:
    """How HF PEFT writes the same method, so that files go both ways.

    Attributes:
        kind: PEFT's `peft_type`.
        tensors: own parameter -> the end of PEFT's key.
        fields: own setting -> PEFT's.
        marks: PEFT settings that tell this method from others of its kind; a file without them is another's.
        fixed: PEFT settings that must hold, where a file gives them, for its equation to be this method's.
        allowed: PEFT settings that must be one of some values, where a file gives them.
    """

    kind: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Traits:
    """What a method declares about itself; no test skips without one of these.

    Attributes:
        seams: where it touches the model or the training.
        card: the published system it implements, a file of the catalogue.
        identity: an untrained adapter leaves the output unchanged.
        merge: whether it folds into the base's weights.
        linear: the change of the weight is linear in the parameters.
        to_lora: it has an exact low-rank form.
        keeps_base: the base's own tensors never change.
        per_row: rows of one batch may use different adapters.
        needs: what a model must have: `bias`, `token ids`.
        peft: HF PEFT's layout of the same method, if it has one.
        xfail: conformance check -> why this method cannot pass it; a strict expected failure.
    """

    seams: tuple[Seam, ...]
    card: str | None = None
    identity: bool = True
    merge: Literal["exact", "no"] = "exact"
    linear: bool = False
    to_lora: bool = False
    keeps_base: bool = True
    per_row: bool = True
    needs: tuple[Literal["bias", "token ids"], ...] = ()
    peft: PeftLayout | None = None
    xfail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method; the fields are settings, `traits` and `kinds` are facts."""

    targets: str | tuple[str, ...] = setting(
        "all-linear", "roles, leaf names, paths, all-linear, or a regex over paths"
    )
    exclude: str | tuple[str, ...] = setting((), "what to leave out of targets, written the same way")
    layers: str | None = setting(None, "blocks to use, as '0-5,8' or '-2' for the last two; all if none")

    traits: ClassVar[Traits]
    kinds: ClassVar[tuple[type[nn.Module], ...]] = MATRIX

    @classmethod
    def name(cls) -> str:
        """The method's name in the registry: that of its file."""
        return cls.__module__.rpartition(".")[2]

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Paths of the modules to graft; '' is the whole model."""
        return anatomy.resolve(
            split_names(self.targets),
            exclude=split_names(self.exclude),
            layers=self.layers,
            kinds=self.kinds,
            who=self.name(),
        )

    def shared(self, model: nn.Module, anatomy: Anatomy) -> nn.Module | None:
        """Parameters that all grafts of one adapter share."""
        return None

    def graft(self, site: Site, shared: nn.Module | None) -> Graft | None:
        """What to run around `site`; None leaves it alone."""
        return None

    def selects(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Names of the base's own parameters that train."""
        return []

    def size(self, site: Site) -> int | None:
        """Trainable numbers that the paper's formula gives for a graft at `site`; None where it gives none."""
        return None

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        """What HF PEFT's configuration needs beyond `traits.peft`, where it has the method."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that HF PEFT's configuration gives beyond `traits.peft.fields`; undoes `peft_extra`."""
        return {}

    def calibrate(self, tuned: Tuned, batches: Iterable[Mapping[str, Any]]) -> None:
        """Look at data before training starts."""

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        """Before the forward of optimizer step `step` (from 0) of `steps`."""

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        """After optimizer step `step` has changed the parameters."""

    def penalty(self, tuned: Tuned) -> Tensor | None:
        """A term added to the loss."""
        return None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """The method's own optimizer over parameter groups; None leaves the choice to the run."""
        return None


def split_names(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """'q_proj,v_proj' as two names; anything with a sign of a regex stays whole."""
    if isinstance(names, str) and re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)+", names):
        return tuple(re.split(r"\s*,\s*", names))
    return names
