"""The base: left alone while an adapter trains, there when it is disabled, given back when it is detached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, bits, require_equal, require_raises, require_same_bits, require_untouched
from pegbox.checks.when import keeps_base, moves_base
from pegbox.core.errors import CannotDisable
from pegbox.core.tuned import Tuned


@check(keeps_base, on="all")
def training_leaves_the_base_alone(lab: Lab) -> None:
    """Keys, tensors and classes of the base are the same after training, bit for bit."""
    model = lab.model()
    before, classes = bits(model), _classes(model)
    tuned = lab.tuned(model).train()
    lab.train(tuned, 3)
    require_same_bits(bits(tuned.model), before, "the base after training")
    require(_classes(tuned.model) == classes, "modules of the base have other classes after training")


@check(moves_base)
def training_moves_the_base(lab: Lab) -> None:
    """As traits.keeps_base is False, training changes the base's own tensors, and keys and classes stay."""
    model = lab.model()
    before, classes = bits(model), _classes(model)
    lab.train(lab.tuned(model).train(), 3)
    after = bits(model)
    require(after.keys() == before.keys() and _classes(model) == classes, "keys or classes changed")
    require(any(not torch.equal(after[k], before[k]) for k in before), "no tensor moved")


@check(on="all")
def detach_gives_the_base_back(lab: Lab) -> None:
    """After detach the model has its own forwards, flags and, unless the method trains them, tensors and outputs."""
    model = lab.model()
    frozen, parameter = next(model.named_parameters())
    parameter.requires_grad_(False)
    want, before = lab.output(model), bits(model)
    tuned = lab.tuned(model)
    if lab.method.traits.keeps_base:
        lab.train(tuned, 2)
    back = tuned.detach()
    require(back is model, "detach gives another model")
    require_untouched(model, before, "after detach", [frozen])
    require_equal(lab.output(model), want, "the detached model")
    lab.tuned(model)  # and can be tuned again


@check(keeps_base, on="all")
def disabled_is_the_base(lab: Lab) -> None:
    """Inside `disabled()` outputs are the base's, bit for bit; after it the adapter is back."""
    want = lab.output(lab.model())
    tuned = lab.shaken()
    with_adapter = lab.output(tuned)
    with tuned.disabled():
        require_equal(lab.output(tuned), want, "the disabled model")
    require_equal(lab.output(tuned), with_adapter, "the model enabled again")


@check(keeps_base)
def disabled_costs_nothing(lab: Lab) -> None:
    """Inside `disabled()` no graft is called."""
    tuned, called = lab.shaken(), []
    for path, graft in tuned.adapter().grafts.items():
        graft.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    with tuned.disabled():
        lab.output(tuned)
    require(not called, f"{len(called)} grafts were called, the first at {called[:1]}")
    lab.output(tuned)
    require(bool(called), "no graft is called when the adapter is enabled either")


@check(on="all")
def hooks_run_as_on_the_base(lab: Lab) -> None:
    """Hooks that a user has put on the modules run as often, in every forward, as they do on the base."""
    paths = list(dict.fromkeys(site.module_path for site in lab.tuned().sites.values()))
    require(_hooked(lab, lab.tuned(), paths) == _hooked(lab, lab.model(), paths), "hooks run more or less often")


def _hooked(lab: Lab, model: nn.Module, paths: list[str]) -> dict[str, int]:
    """How often a hook on each module is called in one forward."""
    base: nn.Module = model.model if isinstance(model, Tuned) else model
    called = dict.fromkeys(paths, 0)
    for path in paths:

        def note(*_: Any, path: str = path) -> None:
            called[path] += 1

        base.get_submodule(path).register_forward_hook(note)
    lab.output(model)
    return called


@check(moves_base)
def disabling_is_refused(lab: Lab) -> None:
    """As traits.keeps_base is False, `disabled()` is a CannotDisable."""
    with require_raises(CannotDisable, "disabled()"), lab.tuned().disabled():
        pass


def _classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}
