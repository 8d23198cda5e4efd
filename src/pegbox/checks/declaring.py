"""Settings and traits: what a method says about itself, and how it refuses what it cannot use."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import nn

from pegbox import anatomy
from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, bits, require_raises, require_untouched
from pegbox.checks.when import lacks_a_need, needs_something
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.graft import Graft, WeightGraft
from pegbox.core.method import Method
from pegbox.core.settings import build
from pegbox.core.tuned import Tuned

OUTSIDE = {  # bound: a value just past it
    "at_least": lambda b: b - 1,
    "above": lambda b: b,
    "at_most": lambda b: b + 1,
    "below": lambda b: b,
}


@check()
def settings_survive_json(lab: Lab) -> None:
    """The settings written as JSON and read back make the same method."""
    written = json.dumps(dataclasses.asdict(lab.method))
    again = build(type(lab.method), json.loads(written))
    require(again == lab.method, f"{written} became {again!r}")


@check()
def settings_hide_no_verb(lab: Lab) -> None:
    """No setting has the name of something a method can be asked for, `size` say, which it would hide."""
    hidden = [f.name for f in dataclasses.fields(lab.method) if callable(getattr(Method, f.name, None))]
    require(not hidden, f"the settings {hidden} hide what every method can be asked for; name them otherwise")


@check()
def settings_keep_their_bounds(lab: Lab) -> None:
    """A value past a setting's bound, or of the wrong type, is a SettingsError that names setting and value."""
    cls, model = type(lab.method), lab.model()
    for field in dataclasses.fields(cls):
        for bound, past in OUTSIDE.items():
            if bound in field.metadata:
                _refused(lab, model, field.name, past(field.metadata[bound]))
        if isinstance(field.default, (int, float)):
            _refused(lab, model, field.name, "nonsense")


def _refused(lab: Lab, model: nn.Module, name: str, value: Any) -> None:
    what = f"{name}={value!r}"
    with require_raises(SettingsError, what, name, str(value)):
        build(type(lab.method), {name: value})
    with require_raises(SettingsError, f"{what} in tune", name, str(value)):
        lab.tuned(model, lab.with_setting(**{name: value}))


@check()
def unknown_settings_get_a_suggestion(lab: Lab) -> None:
    """A misspelt setting is a SettingsError that names the right one."""
    with require_raises(SettingsError, "the setting 'targetz'", "targetz", "targets"):
        build(type(lab.method), {"targetz": "all-linear"})


@check()
def targets_must_match(lab: Lab) -> None:
    """A target that names nothing in the model is a TargetError that repeats it; the model stays as it was."""
    model = lab.model()
    before = bits(model)
    with require_raises(TargetError, "targets='no_such_layer'", "no_such_layer"):
        lab.tuned(model, lab.with_setting(targets="no_such_layer"))
    require_untouched(model, before, "after a refused target")


@check()
def seams_are_declared(lab: Lab) -> None:
    """Weight grafts are there exactly if traits.seams names weight, trained base tensors if it names selection."""
    tuned, seams = lab.tuned(), lab.method.traits.seams
    weights = any(isinstance(g, WeightGraft) for g in tuned.adapter().grafts.values())
    require(weights == ("weight" in seams), f"traits.seams are {seams}, and there are weight grafts: {weights}")
    selects = bool(tuned.adapter().selected)
    require(selects == ("selection" in seams), f"traits.seams are {seams}, and base tensors train: {selects}")
    grafts = [g for g in _changed_rates(lab).adapter().grafts.values() if isinstance(g, Graft)]
    rates = any(rate != 1 for graft in grafts for rate in graft.rates().values())
    require(not rates or "update" in seams, f"grafts ask for learning rates of their own, and traits.seams are {seams}")


def _changed_rates(lab: Lab) -> Tuned:
    """The method with every learning-rate setting away from 1."""
    rates = {f.name: 2.0 for f in dataclasses.fields(lab.method) if f.name.endswith("rate")}
    return lab.tuned(method=lab.with_setting(**rates))


@check(needs_something, lacks_a_need, on="all")
def needs_are_refused_where_they_lack(lab: Lab) -> None:
    """A model without what traits.needs names is refused with a TargetError; the model stays as it was."""
    model = lab.model()
    before = bits(model)
    with require_raises(TargetError, f"{lab.family.name} lacks {lab.method.traits.needs}"):
        Tuned(model, anatomy.of(model), lab.method)
    require_untouched(model, before, "after a refusal")


@check()
def expected_failures_are_checks(lab: Lab) -> None:
    """Every name in traits.xfail is a check."""
    from pegbox.checks.catalogue import CHECKS

    strange = [name for name in lab.method.traits.xfail if name.partition("[")[0] not in CHECKS]
    require(not strange, f"traits.xfail names {strange}, which are no checks")
