"""Every error a user can cause, in one tree.

    PegboxError
    ├── SettingsError     an unknown key, or a value of the wrong type or range
    ├── TargetError       a target matched nothing, or only part of what was named
    ├── MethodError       a method cannot do what was asked of it
    │   ├── CannotMerge
    │   ├── CannotMix
    │   └── CannotDisable
    ├── AdapterError      an adapter file that is damaged, or belongs to another base
    ├── DataError         data that cannot be read or recognised
    ├── ModelError        a model that cannot do what is asked of it
    ├── ParityError       a merged or exported model that differs from the trained one
    ├── Diverged          training that spikes again and again
    └── MissingExtra      an optional dependency that is not installed

A message names the thing, the value, what was expected and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PegboxError(Exception):
    """Base of everything below; the command line prints it without a traceback.

    Attributes:
        peer: the library whose own refusal this is, told on; None where it is Pegbox's.
    """

    peer: str | None = None


class SettingsError(PegboxError):
    """An unknown key, or a value of the wrong type or range."""


class TargetError(PegboxError):
    """A target matched nothing, or only part of what was named."""


class MethodError(PegboxError):
    """A method cannot do what was asked of it."""


class CannotMerge(MethodError):
    """The method changes more than a weight, so it cannot be folded into one."""


class CannotMix(MethodError):
    """These adapters cannot share a model, a stack, a sum or a batch."""


class CannotDisable(MethodError):
    """The method trains the base's own tensors, so there is no base to go back to."""


class AdapterError(PegboxError):
    """An adapter file that is damaged, or belongs to another base."""


class DataError(PegboxError):
    """Data that cannot be read or recognised."""


class ModelError(PegboxError):
    """A model that cannot do what is asked of it."""


class ParityError(PegboxError):
    """A merged or exported model that differs from the trained one."""


class Diverged(PegboxError):
    """Training that spikes again and again, however often it goes back."""


class MissingExtra(PegboxError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'pegbox[{extra}]'")


def did_you_mean(name: str, options: Iterable[str], most: int = 12) -> str:
    """The tail of an error about `name`: the nearest of `options`, or what there is."""
    known = sorted(set(options))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    if not known:
        return "; there is none"
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"; one of: {', '.join(known[:most])}{more}"
