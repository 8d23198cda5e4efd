"""A planted defect, and the check that must see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from pegbox import checks
from pegbox.checks import Case, Result
from pegbox.core import Method

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """A defect that one check must see.

    Attributes:
        check: its name.
        case: a method that passes the check without the defect.
        defect: in words.
        plant: a context in which the defect is there.
        family: of models; the first that the check is for, if not given.
    """

    check: str
    case: Case
    defect: str
    plant: Plant
    family: str | None = None

    @property
    def name(self) -> str:
        return f"{self.check}: {self.defect}"


@dataclass(frozen=True)
class Outcome:
    """How a mutant fared: `healthy` without the defect, `planted` with it."""

    mutant: Mutant
    healthy: Result
    planted: Result
    seconds: float

    @property
    def caught(self) -> bool:
        return self.healthy.status == "pass" and self.planted.status == "fail"


def try_out(mutant: Mutant) -> Outcome:
    """Run the check without the defect and with it."""
    start = time.perf_counter()
    healthy = _attempt(mutant)
    with mutant.plant():
        planted = _attempt(mutant)
    return Outcome(mutant, healthy, planted, time.perf_counter() - start)


def _attempt(mutant: Mutant) -> Result:
    trials = checks.plan(mutant.case, [mutant.check])
    wanted = [t for t in trials if mutant.family in (None, t.family.name) and t.reason is None]
    assert wanted, f"{mutant.name}: the check does not apply to {mutant.case.title()}"
    return checks.attempt(wanted[0])


def put(target: object, name: str, new: Any) -> Plant:
    """In the place of an attribute."""
    return lambda: mock.patch.object(target, name, new, create=True)


def around(target: Any, name: str, wrap: Callable[..., Any]) -> Plant:
    """In the place of a function; `wrap` is given the original first."""
    original = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(original, *args, **kwargs)

    return lambda: mock.patch.object(target, name, wrapped)


def after_init(cls: type, change: Callable[[Any], None]) -> Plant:
    """Something done to every new object of a class."""

    def build(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    return around(cls, "__init__", build)


def declare(cls: type[Method], **traits: Any) -> Plant:
    """Traits that are not the method's."""
    return lambda: mock.patch.object(cls, "traits", replace(cls.traits, **traits))


def both(*plants: Plant) -> Plant:
    """Several at once."""

    @contextmanager
    def planted() -> Iterator[None]:
        with ExitStack() as stack:
            for plant in plants:
                stack.enter_context(plant())
            yield

    return planted
