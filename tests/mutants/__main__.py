"""Plant every defect, show which check saw it, and fail if one went unseen or a check has none."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from pegbox.checks import CHECKS

from .every import MUTANTS
from .mutant import Outcome, try_out


def main() -> int:
    torch.set_num_threads(1)
    outcomes = []
    for mutant in MUTANTS:
        outcomes.append(try_out(mutant))
        print(_line(outcomes[-1]), flush=True)
    missed = [o for o in outcomes if not o.caught]
    bare = sorted(CHECKS.keys() - {m.check for m in MUTANTS})
    caught, biting = len(outcomes) - len(missed), len(CHECKS) - len(bare)
    print(f"{caught} of {len(outcomes)} defects caught, {biting} of {len(CHECKS)} checks bite")
    for name in bare:
        print(f"no defect is planted for {name}")
    return int(bool(missed or bare))


def _line(outcome: Outcome) -> str:
    told = outcome.planted.message if outcome.caught else _why_not(outcome)
    word = "caught" if outcome.caught else "MISSED"
    return f"{word}  {outcome.seconds:5.1f} s  {outcome.mutant.name}\n        {told}"


def _why_not(outcome: Outcome) -> str:
    if outcome.healthy.status != "pass":
        return f"without the defect: {outcome.healthy.status}, {outcome.healthy.message}"
    return f"with the defect: {outcome.planted.status}, {outcome.planted.message}"


if __name__ == "__main__":
    sys.exit(main())
