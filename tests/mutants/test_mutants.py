"""Every conformance check fails on its planted defects, and passes without them."""

from __future__ import annotations

import pytest

from pegbox.checks import CHECKS

from .every import MUTANTS
from .mutant import Mutant, try_out


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name.replace(" ", "_") for m in MUTANTS])
def test_is_caught(mutant: Mutant) -> None:
    outcome = try_out(mutant)
    assert outcome.healthy.status == "pass", outcome.healthy.message
    assert outcome.planted.status == "fail", f"{mutant.defect} went unseen"


def test_every_check_has_a_defect() -> None:
    assert {m.check for m in MUTANTS} == set(CHECKS)
