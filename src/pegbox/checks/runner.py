"""Plan and run checks: plain functions, no test framework."""

from __future__ import annotations

import functools
import inspect
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pegbox.checks.case import Case, suited
from pegbox.checks.catalogue import CHECKS
from pegbox.checks.check import Check, CheckFailed
from pegbox.checks.lab import Lab
from pegbox.checks.models import Family
from pegbox.checks.report import Report, Result, Status
from pegbox.checks.when import has_its_needs, lacks_a_need
from pegbox.core.errors import PegboxError, SettingsError, did_you_mean
from pegbox.core.method import Method
from pegbox.core.seeding import drawn_from

Subject = str | type[Method] | Method | Case


@dataclass(frozen=True)
class Pair:
    """A method, with settings that a family can take, and the family."""

    method: Method
    family: Family

    @functools.cached_property
    def refusal(self) -> str | None:
        """Why a library on which the method stands refuses it here; None if it does not.  Builds one, once."""
        try:
            with torch.random.fork_rng():
                Lab(self.method, self.family, Path()).tuned()
        except PegboxError as error:
            return str(error) if error.peer else None
        except Exception:  # for the checks to tell
            return None
        return None


@dataclass(frozen=True)
class Trial:
    """One check of one case on one family."""

    check: Check
    pair: Pair
    title: str

    @property
    def method(self) -> Method:
        return self.pair.method

    @property
    def family(self) -> Family:
        return self.pair.family

    @property
    def name(self) -> str:
        return f"{self.check.name}[{self.family.name}]"

    @property
    def reason(self) -> str | None:
        """The trait that rules this trial out, or None."""
        missing = None if self._wants_the_lack else has_its_needs(self.method, self.family)
        return missing or self.check.reason(self.method, self.family)

    @property
    def refusal(self) -> str | None:
        """The refusal that rules it out, of a library on which the method stands; builds a model."""
        return None if self._wants_the_lack else self.pair.refusal

    @property
    def _wants_the_lack(self) -> bool:
        return lacks_a_need in self.check.when

    @property
    def expected(self) -> str | None:
        """Why the method says that it fails this."""
        xfail = self.method.traits.xfail
        return xfail.get(self.check.name) or xfail.get(self.name)


def plan(case: Case, only: Iterable[str] = ()) -> list[Trial]:
    """Every trial of a case; builds no model.

    Args:
        only: names of checks; all if empty.
    """
    method, families, title = case.built(), case.all_families(), case.title()
    pairs = {f.name: Pair(suited(method, f), f) for f in families}
    return [Trial(c, pairs[f.name], title) for c in _named(only) for f in _families(c, families)]


def run(
    subjects: Subject | Iterable[Subject],
    *,
    settings: Mapping[str, Any] | None = None,
    only: Iterable[str] = (),
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Check methods.

        report = pegbox.checks.run(["lora", "my_method.py"])

    Args:
        subjects: names, method files, classes, methods with settings, or `Case`s.
        settings: for those without; what is not given is made to fit tiny models.
        only: names of checks; all if empty.
        on_result: called as each result comes, to show progress.

    Raises:
        SettingsError: an unknown method, check or setting.
    """
    one = isinstance(subjects, (str, Method, Case)) or inspect.isclass(subjects)
    listed: list[Subject] = [subjects] if one else list(subjects)  # type: ignore[list-item, arg-type]
    cases = [s if isinstance(s, Case) else Case(s, settings or {}) for s in listed]
    results = []
    for case in cases:
        for trial in plan(case, only):
            results.append(attempt(trial))
            if on_result:
                on_result(results[-1])
    return Report(tuple(results))


def attempt(trial: Trial) -> Result:
    """Run one trial; never raises."""
    if reason := trial.reason or trial.refusal:
        return _result(trial, "not applicable", reason)
    start = time.perf_counter()
    message = _failure(trial)
    seconds = time.perf_counter() - start
    if trial.expected is None:
        return _result(trial, "fail" if message else "pass", message or "", seconds)
    if message is None:
        told = f"traits.xfail says that it fails: {trial.expected}"
        return _result(trial, "unexpected pass", told, seconds)
    return _result(trial, "expected failure", trial.expected, seconds)


def _failure(trial: Trial) -> str | None:
    """Why the check failed, or None."""
    with tempfile.TemporaryDirectory() as folder, drawn_from(0), torch.enable_grad():
        try:
            trial.check.test(Lab(trial.method, trial.family, Path(folder)))
        except CheckFailed as failed:
            return str(failed)
        except Exception as error:  # whatever a method raises is a failure of the check, never of the run
            first = str(error).partition("\n")[0]
            return f"{type(error).__name__}: {first} ({_where(error)})"
    return None


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "nowhere"


def _families(check: Check, families: list[Family]) -> list[Family]:
    if check.on == "all":
        return families
    if check.on == "first":
        return families[:1]
    return [f for f in families if f.name == check.on]


def _named(only: Iterable[str]) -> list[Check]:
    names = [only] if isinstance(only, str) else list(only)
    for name in names:
        if name not in CHECKS:
            raise SettingsError(f"there is no check {name!r}{did_you_mean(name, CHECKS)}")
    return [check for name, check in CHECKS.items() if not names or name in names]


def _result(trial: Trial, status: Status, message: str, seconds: float = 0.0) -> Result:
    check = trial.check
    return Result(check.name, check.about, trial.title, trial.family.name, status, message, seconds)
