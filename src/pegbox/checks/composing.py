"""Several adapters on one base: alone, stacked, summed, one per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pegbox.checks.check import check, require
from pegbox.checks.lab import (
    Lab,
    bits,
    every,
    logits,
    require_close,
    require_different,
    require_equal,
    require_raises,
    shake,
)
from pegbox.checks.when import adds_outputs, has_no_sum, keeps_base, merges, moves_base, not_per_row, per_row
from pegbox.core import files
from pegbox.core.compose import Stack, Sum
from pegbox.core.errors import CannotMix
from pegbox.core.tuned import Tuned

SEEDS = {"a": 1, "b": 2}


def _pair(lab: Lab) -> Tuned:
    """Adapters a and b, with different values, on one base."""
    tuned = lab.tuned(name="a")
    shake(tuned, SEEDS["a"])
    tuned.add("b", lab.method)
    return shake(tuned, SEEDS["b"]).eval()


def _alone(lab: Lab, name: str) -> Tuned:
    return lab.shaken(name=name, seed=SEEDS[name])


@check(keeps_base, on="all")
def each_of_two_is_itself(lab: Lab) -> None:
    """With two adapters on a base, the one in use gives what it gives alone; only it trains, only it is changed."""
    tuned = _pair(lab)
    for name in ("a", "b", "a"):
        tuned.use(name)
        require_equal(lab.output(tuned), lab.output(_alone(lab, name)), f"{name} beside another")
    other = {k: v.clone() for k, v in tuned.state("b").items()}
    lab.train(tuned, 2)
    every(tuned.state("b"), other, require_equal, "b, after a has trained")
    tuned.remove("a", then="b")
    require_equal(lab.output(tuned), lab.output(_alone(lab, "b")), "b, after a is removed")


@check(moves_base)
def company_is_refused(lab: Lab) -> None:
    """As traits.keeps_base is False, a second adapter is a CannotMix."""
    tuned = lab.tuned()
    with require_raises(CannotMix, "a second adapter"):
        tuned.add("second", lab.method)
    require(tuple(tuned.adapters) == ("default",), "the refused adapter is there")


@check(keeps_base)
def the_named_adapter_is_saved(lab: Lab) -> None:
    """Saving an adapter that is not in use, or with a stack in use, writes what saving it alone writes."""
    tuned, cls = _pair(lab), [type(lab.method)]
    alone = lab.save(_alone(lab, "a"), folder="alone")
    want = files.read(alone, cls)
    for plan in ("b", Stack("a", "b")):
        folder = lab.save(tuned.use(plan), "a")
        have = files.read(folder, cls)
        every(have.tensors, want.tensors, require_equal, f"a, saved with {plan} in use")
        require(have.settings == want.settings, f"settings saved with {plan} in use are {have.settings}")
        same = (folder / files.CONFIG).read_text() == (alone / files.CONFIG).read_text()
        require(same, f"{files.CONFIG} is another one with {plan} in use")


@check(keeps_base, merges)
def a_stack_is_one_around_the_other(lab: Lab) -> None:
    """Stack(a, b) is b on the base that a leaves; merging it gives the same outputs."""
    tuned = _pair(lab).use(Stack("a", "b"))
    have = lab.output(tuned)
    inner = _alone(lab, "a").merge()
    outer = lab.tuned(inner)
    outer.load_state(_alone(lab, "b").state())
    require_close(have, lab.output(outer), "Stack(a, b)")
    require_close(lab.output(tuned.merge()), have, "the merged stack")


@check(keeps_base)
def a_stack_runs_all(lab: Lab) -> None:
    """Stack(a) is a; Stack(a, b) is neither a nor b; both train."""
    tuned = _pair(lab)
    alone = {name: lab.output(tuned.use(name)) for name in ("a", "b")}
    require_equal(lab.output(tuned.use(Stack("a"))), alone["a"], "Stack(a)")
    both = lab.output(tuned.use(Stack("a", "b")))
    for name, output in alone.items():
        require_different(both, output, f"Stack(a, b) from {name}")
    gradients = lab.gradients(tuned)
    require(gradients.keys() == tuned.trainable().keys(), "a part of the stack gets no gradient")
    require({k.partition(":")[0] for k in gradients} == {"a", "b"}, f"only {sorted(gradients)[:2]} train")


@check(keeps_base, adds_outputs, on="all")
def a_sum_adds_changes(lab: Lab) -> None:
    """Sum(a=1) is a, Sum(a=0) is the base, Sum(a=1, b=0) is a, and Sum(a=0.5, b=0.5) is neither."""
    tuned = _pair(lab)
    alone, base = {name: lab.output(tuned.use(name)) for name in ("a", "b")}, lab.output(lab.model())
    require_close(lab.output(tuned.use(Sum(a=1.0))), alone["a"], "Sum(a=1)")
    require_close(lab.output(tuned.use(Sum(a=0.0))), base, "Sum(a=0)", lab.to_base)
    require_close(lab.output(tuned.use(Sum(a=1.0, b=0.0))), alone["a"], "Sum(a=1, b=0)")
    half = lab.output(tuned.use(Sum(a=0.5, b=0.5)))
    for name, output in alone.items():
        require_different(half, output, f"Sum(a=0.5, b=0.5) from {name}")


@check(keeps_base, merges)
def a_sum_merges(lab: Lab) -> None:
    """Sum(a=0.3, b=-0.5) is the base with its weights moved by 0.3 of a's change and -0.5 of b's; merged too."""
    tuned = _pair(lab).use(Sum(a=0.3, b=-0.5))
    have = lab.output(tuned)
    base, a, b = bits(lab.model()), _merged(lab, "a"), _merged(lab, "b")
    moved = {k: base[k] + 0.3 * (a[k] - base[k]) - 0.5 * (b[k] - base[k]) for k in base if base[k].is_floating_point()}
    want: nn.Module = lab.model()
    want.load_state_dict(moved, strict=False)
    require_close(have, lab.output(want), "Sum(a=0.3, b=-0.5)")
    require_close(lab.output(tuned.merge()), have, "the merged sum")


def _merged(lab: Lab, name: str) -> dict[str, Tensor]:
    return bits(_alone(lab, name).merge())


@check(has_no_sum)
def a_sum_is_refused(lab: Lab) -> None:
    """Where traits.seams say that the changes have no sum, running one is a CannotMix."""
    tuned = _pair(lab)
    with require_raises(CannotMix, "Sum(a=0.5, b=0.5)"):
        lab.output(tuned.use(Sum(a=0.5, b=0.5)))


@check(per_row, on="all")
def rows_are_each_alone(lab: Lab) -> None:
    """With an adapter per row, and the base where it is None, every row is what it is alone; gradients too."""
    tuned = _pair(lab)
    names = ["b", None, "a", "b"]
    with tuned.rows(names):
        have = lab.output(tuned)
    alone = {name: lab.output(tuned.use(name)) for name in ("a", "b")} | {None: lab.output(lab.model())}
    for row, name in enumerate(names):
        require_close(have[row], alone[name][row], f"row {row} with {name}")
    with tuned.rows([None] * len(names)):
        require_equal(lab.output(tuned), alone[None], "rows that are all the base")
    require_equal(lab.output(tuned), alone["b"], "the model after rows()")


@check(per_row)
def rows_train(lab: Lab) -> None:
    """Gradients through a batch of rows are those of each row alone."""
    tuned = _pair(lab).use(Stack("a", "b"))
    names = ["b", None, "a", "b"]
    with tuned.rows(names):
        have = _row_gradients(lab, tuned, range(len(names)))
    for name in ("a", "b"):
        mine = [row for row, n in enumerate(names) if n == name]
        want = _row_gradients(lab, _alone(lab, name), mine)
        every({k: have[f"{name}:{k}"] for k in want}, want, require_close, f"gradients of {name}")


def _row_gradients(lab: Lab, tuned: Tuned, rows: range | list[int]) -> dict[str, Tensor]:
    """Gradients of the sum of squared outputs of some rows."""
    tuned.zero_grad()
    out = logits(tuned(**lab.inputs()))
    (out[list(rows)].square().sum() / 100).backward()
    return {k: p.grad.clone() for k, p in tuned.trainable().items() if p.grad is not None}


@check(not_per_row)
def rows_are_refused(lab: Lab) -> None:
    """As traits.per_row is False, an adapter per row is a CannotMix."""
    tuned = lab.tuned()
    with require_raises(CannotMix, "rows()"), tuned.rows(["default", None]):
        pass


@check(per_row)
def wrong_rows_are_refused(lab: Lab) -> None:
    """More or fewer names than the batch has rows are a CannotMix."""
    tuned = lab.shaken(name="a")
    with require_raises(CannotMix, "two names for four rows", "2", "4"), tuned.rows(["a", None]), torch.no_grad():
        tuned(**lab.inputs())
