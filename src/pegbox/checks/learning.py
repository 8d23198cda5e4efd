"""Training: gradients, losses, dropout, recomputation, resuming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, every, require_close, require_different, require_equal
from pegbox.checks.when import has_dropout, recomputes
from pegbox.core.tuned import Tuned

STEPS = 20
RATE = 1e-2
TURNS = 12


@check(on="all")
def trained_values_matter(lab: Lab) -> None:
    """Other values of the trained parameters give other outputs: the adapter really runs."""
    want = lab.output(lab.model())
    require_different(lab.output(lab.shaken()), want, "with random trained values")


@check(on="all")
def gradients_reach_what_trains(lab: Lab) -> None:
    """Every trained tensor gets a finite gradient that is not all zero (if traits.routed, some at each site); nothing
    else gets any."""
    tuned = lab.shaken()
    gradients = lab.gradients(tuned)
    trainable = tuned.trainable()
    missing = sorted(trainable.keys() - gradients.keys())
    require(not missing, f"{len(missing)} of {len(trainable)} trained tensors get no gradient: {missing[:3]}")
    wrong = [k for k, g in gradients.items() if not g.isfinite().all()]
    require(not wrong, f"gradients of {wrong[:3]} are not finite")
    zero = _left_out(lab, tuned, [k for k, g in gradients.items() if not g.any()])
    require(not zero, f"gradients of {zero[:3]} are zero")
    selected = set(tuned.adapter().selected)
    base = [
        n for n, p in tuned.model.named_parameters() if n not in selected and (p.requires_grad or p.grad is not None)
    ]
    require(not base, f"the base's own {base[:3]} train")
    inside = [n for n, p in tuned.adapter().named_parameters() if p.requires_grad]
    own = [k for k in trainable if not k.startswith("base.")]
    require(len(inside) == len(own), f"{len(inside)} parameters train, {len(own)} are known")


@check(on="all")
def training_lowers_the_loss(lab: Lab) -> None:
    """Twenty steps on one batch lower the loss, and every trained tensor moves (if routed, some at each site)."""
    tuned = lab.tuned().train()
    before = {k: p.detach().clone() for k, p in tuned.trainable().items()}
    losses = lab.train(tuned, STEPS, lr=RATE)
    require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    still = _left_out(lab, tuned, [k for k, p in tuned.trainable().items() if torch.equal(p, before[k])])
    require(not still, f"{len(still)} of {len(before)} trained tensors never moved: {still[:3]}")


def _left_out(lab: Lab, tuned: Tuned, keys: list[str]) -> list[str]:
    """Those of `keys` that count as left out: where tokens are routed, none of a site that others of its own reach."""
    if not lab.method.traits.routed:
        return keys
    reached = {_site(tuned, key) for key in tuned.trainable().keys() - set(keys)}
    return [key for key in keys if _site(tuned, key) not in reached]


def _site(tuned: Tuned, key: str) -> str:
    """Path of the site that a tensor is of; the key itself where it is of none."""
    path = key.partition(".")[2]
    return next((site for site in tuned.sites if path.startswith(f"{site}.")), key)


@check()
def groups_hold_what_trains(lab: Lab) -> None:
    """The optimizer's groups hold every trained parameter once, and nothing else."""
    tuned = lab.tuned()
    grouped = [id(p) for group in tuned.groups(RATE, 0.1) for p in group["params"]]
    require(sorted(grouped) == sorted(map(id, tuned.trainable().values())), "groups and trainable parameters differ")


@check()
def turns_as_declared(lab: Lab) -> None:
    """traits.in_turn, or traits.grows, holds exactly if what trains changes between steps; what rests has no gradient,
    but a group."""
    tuned, seen = lab.tuned().train(), set()
    ever = set(tuned.trainable())
    for step in range(TURNS):
        lab.method.before_step(tuned, step, TURNS)
        seen.add(frozenset(tuned.trainable()))
        ever |= set(tuned.trainable()) if lab.method.traits.grows else set()
        require(all(ever >= now for now in seen), "a parameter trains that did not before the first step")
        lab.gradients(tuned, step)
        stray = [n for n, p in tuned.named_parameters() if p.grad is not None and not p.requires_grad]
        require(not stray, f"{stray[:3]} rest and have gradients")
        grouped = {name for group in tuned.groups(RATE) for name in group["names"]}
        require(grouped == ever, f"the optimizer's groups lack {sorted(ever - grouped)[:3]}")
    declared = lab.method.traits.in_turn or lab.method.traits.grows
    require((len(seen) > 1) == declared, f"traits.in_turn or grows: {declared}; {len(seen)} choices in {TURNS} steps")


@check(has_dropout)
def dropout_rests_in_eval(lab: Lab) -> None:
    """In eval mode an adapter with dropout gives what it gives without."""
    want = lab.output(lab.shaken())
    dropping = lab.shaken(method=lab.with_setting(dropout=0.5))
    lab.output(dropping.train())
    require_equal(lab.output(dropping.eval()), want, "dropout=0.5 in eval mode")


@check(has_dropout)
def dropout_acts_in_training(lab: Lab) -> None:
    """In training mode an adapter with dropout gives other outputs, and others again the next time."""
    tuned = lab.shaken(method=lab.with_setting(dropout=0.5))
    calm = lab.output(tuned)
    first, second = lab.output(tuned.train()), lab.output(tuned)
    require_different(first, calm, "dropout=0.5 in training mode", at_least=1e-5)
    require_different(second, first, "dropout=0.5 a second time", at_least=1e-5)


@check(recomputes)
def recomputation_keeps_gradients(lab: Lab) -> None:
    """Gradient checkpointing, reentrant or not, gives the gradients that none gives."""
    want = lab.gradients(lab.shaken().train())
    for reentrant in (False, True):
        have = _recomputed(lab, lab.shaken().train(), reentrant)
        every(have, want, require_close, f"use_reentrant={reentrant}")


def _recomputed(lab: Lab, tuned: Tuned, reentrant: bool) -> dict[str, Tensor]:
    model, calls = tuned.model, []
    first = next(m for m in model.get_submodule(tuned.anatomy.blocks[0]).modules() if not list(m.children()))
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    # the second is what transformers called it at first
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:  # only inputs that ask for gradients make it run backwards
        model.get_submodule(tuned.anatomy.role("embed")[0]).register_forward_hook(_ask_for_gradients)
    gradients = lab.gradients(tuned)
    runs = 1 if "taps" in lab.method.traits.seams else 2  # nothing of a tapped block is kept, so nothing is made again
    require(len(calls) == runs, f"a block ran {len(calls)} times, with checkpointing it runs {runs} times")
    return gradients


def _ask_for_gradients(module: Any, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


@check()
def resumes_to_the_same_bits(lab: Lab) -> None:
    """Three steps, a file, and three more on a fresh base end where six steps end, bit for bit."""
    whole = lab.tuned().train()
    lab.train(whole, 6)
    tuned = lab.tuned().train()
    optimizer = torch.optim.AdamW(tuned.groups(RATE))
    lab.train(tuned, 3, optimizer=optimizer)
    resumed = lab.load(lab.save(tuned), lab.model()).train()
    continued = torch.optim.AdamW(resumed.groups(RATE))
    continued.load_state_dict(optimizer.state_dict())
    lab.train(resumed, 3, optimizer=continued)
    every(resumed.state(), whole.state(), require_equal, "resumed")
