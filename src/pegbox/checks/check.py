"""What a check is: a small function with a name, a line of explanation, and the cases it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from pegbox.core.method import Method

if TYPE_CHECKING:
    from pegbox.checks.lab import Lab
    from pegbox.checks.models import Family

When = Callable[[Method, "Family"], str | None]  # why a check is not for a method on a family; None if it is


class CheckFailed(AssertionError):
    """A method does not do what it must."""


@dataclass(frozen=True)
class Check:
    """One promise, and how to test it.

    Attributes:
        name: of the function.
        about: its first paragraph, shown to users.
        test: raises if the promise is broken.
        when: what the method and the family must be, for the check to apply.
        on: `first` of a case's families, `all` of them, or the name of one.
    """

    name: str
    about: str
    test: Callable[[Lab], None]
    when: tuple[When, ...]
    on: str

    def reason(self, method: Method, family: Family) -> str | None:
        """Why the check does not apply, in terms of a declared trait; None if it does."""
        return next((why for when in self.when if (why := when(method, family))), None)


def check(*when: When, on: str = "first") -> Callable[[Callable[[Lab], None]], Check]:
    """Make a function a check."""

    def wrap(test: Callable[[Lab], None]) -> Check:
        about = " ".join((test.__doc__ or "").split("\n\n")[0].split())
        return Check(test.__name__, about, test, when, on)

    return wrap


def require(holds: bool, message: str) -> None:
    """Fail the check with a message unless something holds."""
    if not holds:
        fail(message)


def fail(message: str) -> NoReturn:
    raise CheckFailed(message)
