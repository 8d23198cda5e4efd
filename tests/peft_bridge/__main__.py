"""The whole conformance suite over every tuner of the installed PEFT: `make peft`.

    python -m tests.peft_bridge            # all
    python -m tests.peft_bridge vera oft   # some; what is known of the others stays

Writes docs/results/peft_checks.json, from which docs/peft.md is made.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peft

from pegbox import checks, peft_bridge
from pegbox.checks import Report, Result

RECORD = Path(__file__).parents[2] / "docs" / "results" / "peft_checks.json"


def main(tuners: list[str]) -> int:
    """Check some tuners, all if none is named; gives 1 if something failed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    failed = 0
    for name in [f"peft:{tuner}" for tuner in tuners] or peft_bridge.names():
        start = time.perf_counter()
        report = checks.run(name, on_result=_tell)
        _note(name, report)
        failed += not report.ok
        counts = ", ".join(f"{n} {status}" for status, n in report.count().items())
        print(f"{name}: {counts}; {time.perf_counter() - start:.0f} s", flush=True)
    return int(failed > 0)


def _tell(result: Result) -> None:
    if result.bad:
        print(f"  {result.status} {result.check}[{result.family}]: {result.message}", flush=True)


def _note(name: str, report: Report) -> None:
    """Put one tuner's results into the record."""
    known = json.loads(RECORD.read_text())["tuners"] if RECORD.exists() else {}
    of_this = {name: {"counts": report.count(), "refused": _refused(report), "bad": _bad(report)}}
    record = {"command": "make peft", "peft": peft.__version__, "tuners": dict(sorted((known | of_this).items()))}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _refused(report: Report) -> dict[str, str]:
    """Family -> why PEFT refuses the tuner there."""
    inapplicable = [r for r in report.results if r.status == "not applicable"]
    return {r.family: r.message for r in inapplicable if "HF PEFT refuses" in r.message}


def _bad(report: Report) -> dict[str, Any]:
    return {f"{r.check}[{r.family}]": f"{r.status}: {r.message}" for r in report.bad}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
