"""A method: a published way to fine-tune, as a frozen dataclass of its settings.

A subclass overrides the verbs its paper uses; the rest are no-ops.  It declares its traits once, and the registry,
the docs, the command line and the conformance suite read them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.core.layout import LINEAR, MATRIX
from pegbox.core.settings import setting

if TYPE_CHECKING:
    from pegbox.core.adapter import Adapter, State
    from pegbox.core.calibration import Data
    from pegbox.core.graft import Graft
    from pegbox.core.parts import Rows
    from pegbox.core.site import Site
    from pegbox.core.tuned import Tuned

Factors = Mapping[str, tuple[Tensor, Tensor]]  # of an adapter: A (r, in) and B (out, r), scale and all, by path
Seam = Literal["weight", "output", "tokens", "taps", "skips", "selection", "mixture", "update", "time"]


class Anatomy(Protocol):
    """What a method may ask of a model's structure; `pegbox.anatomy` provides it."""

    @property
    def model(self) -> nn.Module:
        """Whose anatomy this is."""

    @property
    def blocks(self) -> list[str]:
        """Paths of the repeated blocks, in depth order."""

    @property
    def unread(self) -> frozenset[str]:
        """Paths of modules on whose outputs nothing depends; they have no role."""

    def roles(self) -> dict[str, list[str]]:
        """Every role that this model has, to the paths of its modules."""

    def role(self, name: str) -> list[str]:
        """Paths of the modules in a role."""

    def kv_heads(self, path: str) -> int:
        """Heads of keys and values of the attention that holds a module; TargetError where that is not known."""

    def resolve(
        self,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        layers: str | None = None,
        kinds: tuple[type[nn.Module], ...] = LINEAR,
        parts: bool = False,
        who: str = "this method",
    ) -> list[str]:
        """Paths that a target names; TargetError if it, or a part of it, names nothing."""

    def parts(self, path: str) -> Mapping[str, Rows]:
        """The named rows of a whole matrix, by name."""


def block_of(path: str, anatomy: Anatomy) -> str:
    """The block that holds a site; nothing where none does."""
    return next((block for block in anatomy.blocks if path.startswith(f"{block}.")), "")


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
        embedding: as `tensors`, at an embedding; empty where PEFT does not have the method there.
        convolution: own parameter -> its shape at a convolution: `kernel` (r, in, k, ...), `point` (out, r, 1, ...) or
            `channel` (1, out, 1, ...); empty where PEFT does not have the method there.
        claims: PEFT's own files of this kind are read as this method's; else only its own are.
    """

    kind: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    embedding: Mapping[str, str] = field(default_factory=dict)
    convolution: Mapping[str, Literal["kernel", "point", "channel"]] = field(default_factory=dict)
    claims: bool = True


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
        exact_base: its file leaves out what the base gives, and fits no base that is kept otherwise than in training.
        in_turn: which of its tensors train changes from step to step (`tuned.select`).
        grows: it takes on tensors while it trains (`pegbox.core.growth`).
        routed: tokens reach those of its tensors that a router gives them; a batch may leave others out, and a rounded
            router may choose otherwise.
        per_row: rows of one batch may use different adapters.
        packs: a row may hold several examples, each of which gets what it gets alone.
        needs: what a model must have: `bias`, `norms` (trained), `lookups` (embeddings), `token ids`, `blocks` (that
            its anatomy knows), `hidden states` (a stack of blocks that gives them to a head), `skips` (of a U-Net).
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
    exact_base: bool = False
    in_turn: bool = False
    grows: bool = False
    routed: bool = False
    per_row: bool = True
    packs: bool = True
    needs: tuple[Literal["bias", "norms", "lookups", "token ids", "blocks", "hidden states", "skips"], ...] = ()
    peft: PeftLayout | None = None
    xfail: Mapping[str, str] = field(default_factory=dict)


def by_settings(usual: Traits, chosen: Callable[[Any], Traits]) -> Any:
    """Traits that hang on settings: `traits: ClassVar[Traits] = by_settings(usual, chosen)`.

    Args:
        usual: what the class has.
        chosen: of a method with its settings, what it has.
    """
    return _BySettings(usual, chosen)


class _BySettings:
    def __init__(self, usual: Traits, chosen: Callable[[Any], Traits]) -> None:
        self.usual, self.chosen = usual, chosen

    def __get__(self, method: Method | None, cls: type[Method]) -> Traits:
        return self.usual if method is None else self.chosen(method)


@dataclass(frozen=True)
class Preset:
    """Settings of a method that go together, under a name.

    Attributes:
        source: who published them: authors, year, where in the paper or its code.
        settings: those that differ from the method's defaults.
    """

    source: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method; the fields are settings, `traits`, `kinds` and `presets` are facts."""

    targets: str | tuple[str, ...] = setting(
        "all-linear", "roles, leaf names, paths, all-linear, or a regex over paths"
    )
    exclude: str | tuple[str, ...] = setting((), "what to leave out of targets, written the same way")
    layers: str | None = setting(None, "blocks to use, as '0-5,8' or '-2' for the last two; all if none")

    traits: ClassVar[Traits]
    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR  # MATRIX for a method that maps weights
    reads: ClassVar[tuple[str, ...]] = ()  # names that its grafts look up in the context, see `tuned.given`
    found: ClassVar[tuple[str, ...]] = ()  # settings that data or training finds, ranks say: a checkpoint has others
    restarts: ClassVar[bool] = True  # what is born while it trains goes through the whole schedule, not its rest
    presets: ClassVar[Mapping[str, Preset]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}  # other words for its settings
    small: ClassVar[Mapping[str, Any]] = {}  # settings that fit models of width 32, where small numbers alone do not

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "traits" in vars(cls) and "kinds" not in vars(cls) and "weight" in cls.traits.seams:
            cls.kinds = MATRIX

    @classmethod
    def name(cls) -> str:
        """The method's name in the registry: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def about(cls) -> str:
        """Title and source, equation, departures: the docstring of its file."""
        return sys.modules[cls.__module__].__doc__ or ""

    @classmethod
    def preset(cls, name: str) -> Preset:
        """One of `presets`.

        Raises:
            SettingsError: no such preset, with the nearest one.
        """
        if name not in cls.presets:
            raise SettingsError(f"{cls.name()} has no preset {name!r}{did_you_mean(str(name), cls.presets)}")
        return cls.presets[name]

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Paths of the modules to graft; '' is the whole model."""
        return anatomy.resolve(
            split_names(self.targets),
            exclude=split_names(self.exclude),
            layers=self.layers,
            kinds=self.kinds,
            parts="weight" in self.traits.seams,
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

    def shared_size(self) -> int:
        """Trainable numbers of the paper's formula that all grafts share, where `size` leaves them out."""
        return 0

    def peft_extra(self, model: nn.Module) -> dict[str, Any]:
        """What HF PEFT's configuration needs beyond `traits.peft`, where it has the method."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that HF PEFT's configuration gives beyond `traits.peft.fields`; undoes `peft_extra`."""
        return {}

    def file_config(self, adapter: Adapter) -> dict[str, Any] | None:
        """HF PEFT's whole configuration, where `traits.peft` does not say it."""
        return None

    def to_file(self, model: nn.Module, adapter: Adapter, state: State) -> State | None:
        """The adapter's tensors as its file has them, where `traits.peft` does not say it; copies are not in it."""
        return None

    def from_file(self, model: nn.Module, adapter: Adapter, tensors: State) -> State | None:
        """Undoes `to_file`.

        Raises:
            AdapterError: a tensor is missing, or one too many, or of another shape.
        """
        return None

    def calibrates(self) -> bool:
        """Whether it looks at data before training, with these settings."""
        return type(self).calibrate is not Method.calibrate

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One graft's tensors, by own name, as HF PEFT's file has them: `traits.peft.tensors`, in its shapes."""
        return dict(tensors)

    def unpack(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `pack`; `own` are the graft's tensors now.  What the file lacks is left out."""
        return dict(tensors)

    def in_peft(self, model: nn.Module, shared: nn.Module | None) -> bool:
        """Whether HF PEFT can express an adapter on this model; a file of one that it cannot has Pegbox's keys."""
        return True

    def calibrate(self, tuned: Tuned, data: Data) -> None:
        """Look at data before training starts, and before there is an optimizer."""

    def tasks_known(self) -> tuple[str, ...]:
        """Names of the tasks that `task_ids` number, where it has names for them."""
        return ()

    def tasks_needed(self) -> int:
        """How many tasks it knows, where rows must say theirs wherever it runs; 0 where they need not."""
        return 0

    def read_aside(self) -> str | None:
        """Where what it trains is read, if that is not the model's output; objectives know of that alone."""
        return None

    def with_tasks(self, names: Sequence[str]) -> Self:
        """The method for data whose rows name these tasks; the same where it needs no names of them.

        Raises:
            SettingsError: its settings say otherwise.
        """
        return self

    def check_given(self, values: Mapping[str, Any]) -> None:
        """Look over what a caller hands to its grafts (`reads`).

        Raises:
            MethodError: a value that they cannot use.
        """

    def takes(self) -> Sequence[str]:
        """Folders of low-rank adapters that it is made from; see `made_from` and `begin`."""
        return ()

    def made_from(self, adapters: Sequence[Factors]) -> Method:
        """The same, with what those adapters say, ranks say, in its settings; before it is put on a model."""
        return self

    def begin(self, tuned: Tuned, name: str, adapters: Sequence[Factors]) -> None:
        """Take up those adapters, once it has been put on a model under a name; not where it comes from a file."""

    def inherited(self, other: Self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a graft starts with that follows on another adapter of this method: tensors by own name.

        Args:
            other: the other adapter's method, with its settings.
            own: as they are drawn.
            theirs: the other adapter's, at the same site.
        """
        return dict(theirs)

    def before_step(self, tuned: Tuned, step: int, steps: int) -> None:
        """Before the forward of optimizer step `step` (from 0) of `steps`."""

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        """After optimizer step `step` has changed the parameters."""

    def training_state(self, adapter: Adapter) -> State:
        """What its steps go by beside the adapter's own tensors, by names of its own, for a checkpoint to hold."""
        return {}

    def load_training_state(self, adapter: Adapter, state: State) -> None:
        """Undo `training_state`, on an adapter that has its tensors already."""

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
