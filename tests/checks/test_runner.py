"""The suite as a user runs it: on names, files and classes; expected failures; what does not apply."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest

from pegbox import checks
from pegbox.checks import Case, Result
from pegbox.core.errors import SettingsError
from pegbox.methods.lora import LoRA

MY_METHOD = '''
"""A shift of every output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pegbox.core import Graft, Method, Site, Traits, setting


class ShiftGraft(Graft):
    def __init__(self, site: Site, amount: float) -> None:
        super().__init__()
        self.amount = amount
        self.shift = nn.Parameter(torch.zeros(site.shape[0]))

    def forward(self, base, x):
        return base(x) + self.amount * self.shift


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    amount: float = setting(1.0, "multiplies the shift", above=0)

    traits: ClassVar[Traits] = Traits(seams=("output",), merge="no"XFAIL)

    def graft(self, site: Site, shared: nn.Module | None) -> ShiftGraft:
        return ShiftGraft(site, self.amount)
'''


def method_file(folder: Path, xfail: str = "") -> str:
    path = folder / "my_method.py"
    path.write_text(MY_METHOD.replace("XFAIL", xfail))
    return str(path)


def xfail(**reasons: str) -> object:
    return mock.patch.object(LoRA, "traits", dataclasses.replace(LoRA.traits, xfail=reasons))


def status(check: str) -> Result:
    (result,) = checks.run(Case("lora", {"rank": 4}, families=("mlp",)), only=[check]).results
    return result


def test_a_method_file_of_a_users_own(tmp_path: Path) -> None:
    report = checks.run(Case(method_file(tmp_path), families=("llama", "bert", "conv", "nf4")))
    assert report.ok, checks.render(report)
    assert {r.method for r in report.results} == {"my_method()"}
    assert report.count()["pass"] > 80


def test_a_broken_method_file_fails_and_says_where(tmp_path: Path) -> None:
    path = Path(method_file(tmp_path))
    path.write_text(path.read_text().replace("torch.zeros", "torch.ones"))
    report = checks.run(str(path), only=["starts_as_declared"])
    assert not report.ok
    assert "FAIL  starts_as_declared[llama]  the untrained model: differs by" in checks.render(report)


def test_names_classes_methods_and_cases_are_one() -> None:
    for subject in ("lora", LoRA, LoRA(rank=4, alpha=6.0), Case("lora")):
        report = checks.run(subject, only=["settings_survive_json"])
        assert [r.method for r in report.results] == ["lora(rank=4, alpha=6.0)"]
    assert len(checks.run(["lora", LoRA], only=["settings_survive_json"]).results) == 2


def test_settings_are_given() -> None:
    report = checks.run("lora", settings={"rank": 2, "rslora": True}, only=["settings_survive_json"])
    assert report.results[0].method == "lora(rank=2, alpha=6.0, rslora=True)"


@pytest.mark.parametrize(
    ("subject", "only", "words"),
    [
        ("lorra", [], "unknown method 'lorra'; did you mean 'lora'"),
        ("lora", ["starts_as_declare"], "no check 'starts_as_declare'; did you mean 'starts_as_declared'"),
        (Case("lora", families=("lama",)), [], "no family of models 'lama'; did you mean 'llama'"),
        (Case("lora", {"rnak": 2}), [], "no setting 'rnak'; did you mean 'rank'"),
    ],
)
def test_mistakes(subject: str | Case, only: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        checks.run(subject, only=only)


def test_an_expected_failure_must_fail() -> None:
    with xfail(starts_as_declared="a reason"):
        result = status("starts_as_declared")
    assert result.status == "unexpected pass"
    assert result.bad
    assert result.message == "traits.xfail says that it fails: a reason"


@pytest.mark.parametrize("name", ["starts_as_declared", "starts_as_declared[mlp]"])
def test_an_expected_failure_that_fails_is_as_declared(name: str) -> None:
    from pegbox.methods.lora import LoRAGraft

    shifted = mock.patch.object(LoRAGraft, "forward", lambda self, base, x: base(x) + 1)
    with xfail(**{name: "a reason"}), shifted:
        result = status("starts_as_declared")
    assert (result.status, result.bad, result.message) == ("expected failure", False, "a reason")


def test_what_does_not_apply_says_why() -> None:
    result = status("merging_is_refused")
    assert (result.status, result.bad, result.message) == ("not applicable", False, "traits.merge is 'exact'")


@pytest.mark.parametrize(("peer", "told"), [("HF PEFT", "not applicable"), (None, "fail")])
def test_a_refusal_of_another_library_rules_a_check_out(peer: str | None, told: str) -> None:
    """And one of Pegbox's own does not."""
    refused = SettingsError("there is no such layer")
    refused.peer = peer
    with mock.patch("pegbox.methods.lora.LoRA.graft", side_effect=refused):
        result = status("starts_as_declared")
    assert result.status == told
    assert "there is no such layer" in result.message


def test_a_refusal_in_the_middle_of_a_check_is_a_failure() -> None:
    refused = SettingsError("not a second time")
    refused.peer = "HF PEFT"
    with mock.patch.object(LoRA, "selects", side_effect=[[], [], refused]):
        result = status("same_seed_same_bits")  # builds two, after the first that asks whether it is refused
    assert (result.status, result.bad) == ("fail", True)


def test_a_check_that_crashes_is_a_failure_with_its_place() -> None:
    with mock.patch("pegbox.methods.lora.LoRAGraft.start", side_effect=ZeroDivisionError("no")):
        result = status("starts_as_declared")
    assert result.status == "fail"
    assert result.message.startswith("ZeroDivisionError: no (mock.py:")


def test_results_come_one_by_one_and_are_plain_data() -> None:
    seen: list[Result] = []
    report = checks.run("lora", only=["settings_survive_json", "merging_is_refused"], on_result=seen.append)
    assert tuple(seen) == report.results
    assert json.loads(json.dumps(report.as_data()))[0]["status"] == "pass"
    assert report.count() == {"pass": 1, "not applicable": 1}


def test_the_rendering_tells_what_matters() -> None:
    report = checks.run("lora", only=["settings_survive_json", "merging_is_refused"])
    short, long = checks.render(report), checks.render(report, verbose=True)
    assert short.startswith("lora(rank=4, alpha=6.0): 1 of 1 as declared\n1 pass, 1 not applicable; ")
    assert "n/a   merging_is_refused[llama]  traits.merge is 'exact'" in long


def test_the_global_generator_is_left_alone() -> None:
    import torch

    before = torch.get_rng_state()
    checks.run("lora", only=["starts_as_declared", "compiles_whole"])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_check_explains_itself() -> None:
    for name, check in checks.CHECKS.items():
        assert check.about.endswith("."), name
        assert 20 < len(check.about) < 160, name
