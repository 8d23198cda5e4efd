"""Every method against every check of the public suite.  A new method adds one line to CASES."""

from __future__ import annotations

import pytest

from pegbox import checks, methods
from pegbox.checks import Case, Trial

CASES = [
    Case("bat", {"rank": 4}),
    Case("bitfit"),
    Case("dora", {"rank": 4, "alpha": 6.0}),
    Case("full"),
    Case("lora", {"rank": 4, "alpha": 6.0}),
    Case("lora", {"rank": 4, "alpha": 3.0, "rslora": True, "b_rate": 16.0}, families=("llama",)),
    Case("miss", {"rank": 5}),
    Case("miss", {"rank": 8, "mini": 4}, families=("llama", "gpt2")),
    Case("prompt_tuning", {"tokens": 3}),
    Case("series", {"bottleneck": 4}),
]

TRIALS = [trial for case in CASES for trial in checks.plan(case)]
DECLARED = [trial for trial in TRIALS if trial.reason is None]


@pytest.mark.parametrize("trial", DECLARED, ids=[f"{t.title}-{t.name}" for t in DECLARED])
def test_does_what_it_declares(trial: Trial) -> None:
    result = checks.attempt(trial)
    assert not result.bad, f"{result.status}: {result.message}\n{result.about}"


def test_every_method_has_a_line() -> None:
    assert {case.built().name() for case in CASES} == set(methods.names())


def test_every_check_applies_to_some_method() -> None:
    assert {trial.check.name for trial in DECLARED} == set(checks.CHECKS)


def test_what_does_not_apply_has_a_reason() -> None:
    """Few words that name a trait, a setting or what a family lacks; nothing is left out in silence."""
    reasons = {trial.reason for trial in TRIALS if trial.reason}
    words = ("traits.", "setting", "does not generate", "no gradient checkpointing", "not installed")
    assert all(any(word in reason for word in words) for reason in reasons), reasons
