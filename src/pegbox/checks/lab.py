"""What every check is given: one method, one family of models, and the few verbs to put them to the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pegbox import anatomy
from pegbox.checks.check import require
from pegbox.checks.models import Batch, Family, answer, inputs
from pegbox.core import files
from pegbox.core.errors import PegboxError
from pegbox.core.method import Method
from pegbox.core.seeding import drawn_from
from pegbox.core.tuned import Tuned

FP32 = 1e-5  # largest difference, relative to the largest value
BF16 = 1e-2  # norm of the difference, relative to the norm


@dataclass(frozen=True)
class Lab:
    """One method on one family.

    Attributes:
        method: with settings that fit the tiny models.
        family: of the models.
        folder: an empty folder for files.
    """

    method: Method
    family: Family
    folder: Path

    @property
    def to_base(self) -> float:
        """How near an adapter that changes nothing must come to the base's own outputs."""
        return max(FP32, self.family.rounding)

    # -- making ------------------------------------------------------------------------------------------------

    def model(self, seed: int = 0) -> nn.Module:
        """A base in eval mode, the same bits whenever asked for."""
        with drawn_from(seed):
            return self.family.build().eval()

    def tuned(
        self, model: nn.Module | None = None, method: Method | None = None, *, name: str = "default", seed: int = 0
    ) -> Tuned:
        """The method, freshly put on a base."""
        base = self.model() if model is None else model
        return self._given(Tuned(base, anatomy.of(base), method or self.method, name=name, seed=seed).eval())

    def _given(self, tuned: Tuned) -> Tuned:
        """With what the method reads from the context, in every forward."""
        tuned.context.given = {k: v for k, v in self.family.given().items() if k in self.method.reads}
        return tuned

    def shaken(
        self,
        model: nn.Module | None = None,
        method: Method | None = None,
        *,
        name: str = "default",
        seed: int = 1,
        size: float = 0.1,
    ) -> Tuned:
        """The same with random values in all that trains, as if it had been trained."""
        return shake(self.tuned(model, method, name=name), seed, size)

    def with_setting(self, **changes: Any) -> Method:
        return dataclasses.replace(self.method, **changes)

    # -- running -----------------------------------------------------------------------------------------------

    def batch(self, seed: int = 0) -> Batch:
        return self.family.batch(seed)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """A batch without its labels; `dtype` is of what is no id."""
        batch = inputs(self.family.batch(seed))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}

    @torch.no_grad()
    def output(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The logits for one batch."""
        return logits(model(**self.inputs(seed, next(model.parameters()).dtype)))

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        return self.family.loss(model, seed)

    def gradients(self, tuned: Tuned, seed: int = 0) -> dict[str, Tensor]:
        """Of one batch's loss, by key of the parameter; a parameter without a gradient is absent."""
        tuned.zero_grad()
        self.loss(tuned, seed).backward()
        return {k: p.grad.clone() for k, p in tuned.trainable().items() if p.grad is not None}

    def train(
        self, tuned: Tuned, steps: int, *, lr: float = 1e-2, optimizer: torch.optim.Optimizer | None = None
    ) -> list[float]:
        """Losses of a few AdamW steps on one batch."""
        optimizer = optimizer or torch.optim.AdamW(tuned.groups(lr))
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(tuned)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, tuned: Tuned, name: str | None = None, folder: str = "adapter") -> Path:
        return files.save(tuned, self.folder / folder, name)

    def load(self, folder: Path, model: nn.Module, name: str = "default") -> Tuned:
        """Put a saved adapter on a base, or beside others on a tuned model."""
        tuned = model if isinstance(model, Tuned) else Tuned(model, anatomy.of(model)).eval()
        cls = type(self.method)
        return self._given(files.put(files.read(folder, [cls]), tuned, cls, name).eval())


def logits(out: Any) -> Tensor:
    """The tensor a model answers with."""
    return answer(out)


@torch.no_grad()
def shake(tuned: Tuned, seed: int = 1, size: float = 0.1) -> Tuned:
    """Add a random value, of `size` on average, to every trained number."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return tuned


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state; a quantised tensor as the plain ones that it holds."""
    return {k: v.detach().clone() for key, value in model.state_dict().items() for k, v in _plain(key, value)}


def _plain(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    held: Any = value
    if not is_traceable_wrapper_subclass(held):
        return [(key, value)]
    return [(f"{key}.{part}", getattr(held, part)) for part in held.__tensor_flatten__()[0]]


def require_same_bits(have: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    require(have.keys() == want.keys(), f"{what}: keys changed, {sorted(have.keys() ^ want.keys())[:3]}")
    moved = [k for k, v in want.items() if not torch.equal(have[k], v)]
    require(not moved, f"{what}: {len(moved)} of {len(want)} tensors changed, the first is {moved[:1]}")


def require_equal(have: Tensor, want: Tensor, what: str) -> None:
    """Bit for bit."""
    require(have.shape == want.shape, f"{what}: shape {tuple(have.shape)} instead of {tuple(want.shape)}")
    require(torch.equal(have, want), f"{what}: differs by up to {_distance(have, want):.1e}, must be equal")


def require_close(have: Tensor, want: Tensor, what: str, tolerance: float = FP32) -> None:
    """Within a share of the largest value."""
    require(have.shape == want.shape, f"{what}: shape {tuple(have.shape)} instead of {tuple(want.shape)}")
    require(bool(have.isfinite().all()), f"{what}: values that are not finite")
    allowed = tolerance * max(1.0, float(want.abs().max()))
    distance = _distance(have, want)
    require(distance <= allowed, f"{what}: differs by {distance:.1e}, allowed are {allowed:.1e}")


def require_near(have: Tensor, want: Tensor, what: str, tolerance: float = BF16) -> None:
    """Within a share of the norm."""
    require(have.shape == want.shape, f"{what}: shape {tuple(have.shape)} instead of {tuple(want.shape)}")
    distance = float((have.float() - want.float()).norm() / want.float().norm())
    require(distance <= tolerance, f"{what}: differs by {distance:.1e} of its norm, allowed are {tolerance:.1e}")


def require_different(have: Tensor, other: Tensor, what: str, at_least: float = 1e-3) -> None:
    """Apart by more than rounding."""
    require(have.shape == other.shape, f"{what}: shape {tuple(have.shape)} instead of {tuple(other.shape)}")
    require(bool(have.isfinite().all()), f"{what}: values that are not finite")
    distance = _distance(have, other)
    require(distance >= at_least, f"{what}: differs by {distance:.1e} only")


@contextmanager
def require_raises(error: type[PegboxError], what: str, *words: str) -> Iterator[None]:
    """The block raises this error, with these words in its message."""
    try:
        yield
    except error as raised:
        missing = [word for word in words if word not in str(raised)]
        require(not missing, f"{what}: the message says nothing of {missing[:1]}: {raised}")
        return
    except Exception as raised:
        require(False, f"{what}: {type(raised).__name__} instead of {error.__name__}: {raised}")
    require(False, f"{what}: no {error.__name__} was raised")


def require_untouched(model: nn.Module, want: dict[str, Tensor], what: str, still: Iterable[str] = ()) -> None:
    """A base with its own tensors, forwards and flags, nothing of ours about it; `still` are those that were frozen."""
    require_same_bits(bits(model), want, what)
    patched = [path for path, m in model.named_modules() if "forward" in m.__dict__]
    require(not patched, f"{what}: a forward is left on {patched[:1]}")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()]
    still = [name for name in still if model.get_parameter(name).is_floating_point()]
    require(frozen == still, f"{what}: {frozen[:3]} do not ask for gradients")


def every(pairs: dict[str, Tensor], other: dict[str, Tensor], compare: Callable[..., None], what: str) -> None:
    """Compare two sets of tensors by key."""
    require(pairs.keys() == other.keys(), f"{what}: other keys, {sorted(pairs.keys() ^ other.keys())[:3]}")
    for key, value in pairs.items():
        compare(value, other[key], f"{what}: {key}")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0
