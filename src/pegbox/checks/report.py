"""What a run of the checks found, and how to print it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["pass", "fail", "expected failure", "unexpected pass", "not applicable"]
BAD: tuple[Status, ...] = ("fail", "unexpected pass")
SIGNS: dict[Status, str] = {
    "pass": "ok",
    "fail": "FAIL",
    "expected failure": "xfail",
    "unexpected pass": "XPASS",
    "not applicable": "n/a",
}


@dataclass(frozen=True)
class Result:
    """One check of one method on one family.

    Attributes:
        method: with the settings that differ from its defaults.
        message: why it failed, what was expected to fail and why, or the trait that rules it out.
        seconds: it took.
    """

    check: str
    about: str
    method: str
    family: str
    status: Status
    message: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status in BAD


@dataclass(frozen=True)
class Report:
    """All results, in the order they came."""

    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and nothing passed that was declared to fail."""
        return not self.bad

    @property
    def bad(self) -> list[Result]:
        return [r for r in self.results if r.bad]

    def count(self) -> dict[Status, int]:
        found = Counter(r.status for r in self.results)
        return {status: found[status] for status in SIGNS if found[status]}

    def as_data(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [asdict(r) for r in self.results]


def render(report: Report, *, verbose: bool = False) -> str:
    """A table of method, check and families, then every failure in full.

    Args:
        verbose: also list what passed and what does not apply.
    """
    lines: list[str] = []
    for method in dict.fromkeys(r.method for r in report.results):
        lines += _method(method, [r for r in report.results if r.method == method], verbose)
    total = ", ".join(f"{n} {status}" for status, n in report.count().items())
    seconds = sum(r.seconds for r in report.results)
    return "\n".join([*lines, f"{total or 'nothing was checked'}; {seconds:.1f} s"])


def _method(method: str, results: Sequence[Result], verbose: bool) -> list[str]:
    bad, total = sum(r.bad for r in results), sum(r.status != "not applicable" for r in results)
    lines = [f"{method}: {total - bad} of {total} as declared"]
    for result in results:
        if verbose or result.bad or result.status == "expected failure":
            told = f"  {result.message}" if result.message else ""
            lines.append(f"  {SIGNS[result.status]:<5} {result.check}[{result.family}]{told}")
            if result.bad:
                lines.append(f"        {result.about}")
    return lines
