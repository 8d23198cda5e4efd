"""The whole conformance suite over every tuner of the installed PEFT, on the models that PEFT has it for."""

from __future__ import annotations

import sys
import warnings

from pegbox import checks, peft_bridge
from pegbox.checks import Case, Result
from pegbox.peft_bridge.kinds import NOT_ON

from .settings import SMALL

FAMILIES = ("llama", "bert", "tied", "nf4", "int8")


def main(tuners: list[str]) -> int:
    """Check some tuners, all if none is named; gives 1 if something failed."""
    warnings.simplefilter("ignore")
    known = tuners or [name.removeprefix("peft:") for name in peft_bridge.names()]
    failed = 0
    for tuner in known:
        families = [family for family in FAMILIES if family not in NOT_ON.get(tuner, {})]
        report = checks.run(Case(f"peft:{tuner}", SMALL.get(tuner, {}), families=families), on_result=_tell)
        failed += not report.ok
        print(f"peft:{tuner}: {'as declared' if report.ok else 'not as declared'}", flush=True)
    return int(failed > 0)


def _tell(result: Result) -> None:
    if result.bad:
        print(f"  {result.status} {result.check}[{result.family}]: {result.message}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
