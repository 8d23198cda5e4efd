"""The conformance suite: what every method must do, whatever it is.

    report = pegbox.checks.run(["lora", "my_method.py"])
    print(pegbox.checks.render(report))

A check is a plain function; no test framework is needed.  What a method cannot do is a declared trait, which rules
checks out, and so does a refusal of the library that a method stands on; a check it should pass and does not is named
in `traits.xfail` with the reason, and must then fail.
"""

from __future__ import annotations

from pegbox.checks.case import Case
from pegbox.checks.catalogue import CHECKS
from pegbox.checks.check import Check, CheckFailed
from pegbox.checks.models import FAMILIES, Family
from pegbox.checks.report import Report, Result, render
from pegbox.checks.runner import Trial, attempt, plan, run

__all__ = [
    "CHECKS",
    "FAMILIES",
    "Case",
    "Check",
    "CheckFailed",
    "Family",
    "Report",
    "Result",
    "Trial",
    "attempt",
    "plan",
    "render",
    "run",
]
