"""Growing adapters: what an optimizer and a schedule are given for the tensors that are born while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments

from pegbox.core import Tuned
from pegbox.core.errors import CannotMix, MethodError

Share = Callable[[int], float]  # of the peak learning rate, by step


def restarted(schedule: Share, born: int, steps: int) -> Share:
    """A schedule gone through whole in the steps that are left; a function, of which a checkpoint keeps nothing."""

    def share(step: int) -> float:
        return schedule(round(max(0, step - born) * steps / max(1, steps - born)))

    return share


def follow_growth(tuned: Tuned, optimizer: torch.optim.Optimizer | None) -> None:
    """Give an optimizer the tensors that it lacks, with those of one step in a group of their own.

    Args:
        optimizer: over `tuned.groups()` as they once were, or what a trainer has wrapped around it.

    Raises:
        MethodError: no optimizer.
    """
    if optimizer is None:
        raise MethodError(
            f"{_name(tuned)} takes on tensors while it trains, and the optimizer needs them: "
            "before_step(step, steps, optimizer)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    first = optimizer.param_groups[0]
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    groups = tuned.groups(first.get("initial_lr", first["lr"]), decay)
    _drop(optimizer, held - {id(p) for group in groups for p in group["params"]})
    for group in groups:
        if new := [(p, n) for p, n in zip(group["params"], group["names"], strict=True) if id(p) not in held]:
            parameters, names = zip(*new, strict=True)
            optimizer.add_param_group(group | {"params": list(parameters), "names": list(names)})


def _drop(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    """Let go of parameters that are no more, and of groups of them alone."""
    if not gone:
        return
    for group in optimizer.param_groups:
        for p in [p for p in group["params"] if id(p) in gone]:
            optimizer.state.pop(p, None)
        kept = [k for k, p in enumerate(group["params"]) if id(p) not in gone]
        for word in ("params", "names"):
            if word in group:
                group[word] = [group[word][k] for k in kept]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def schedule_of(scheduler: Any) -> Share:
    """The function of a schedule of transformers', a LambdaLR.

    Raises:
        CannotMix: another kind of schedule.
    """
    inner = getattr(scheduler, "scheduler", scheduler)  # of accelerate's wrapper
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise CannotMix(
            f"a growing adapter gives the schedule other groups to drive, which {type(inner).__name__} does not take; "
            "use schedule=linear, cosine, constant, or another function of the step"
        )
    found: Share = inner.lr_lambdas[0]
    return found


def follow_schedule(tuned: Tuned, scheduler: Any, usual: Share, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Let a schedule drive the groups that there are now, from its beginning for those that were born, where the method
    `restarts`.

    Args:
        usual: the schedule's function, `schedule_of` before anything was born.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    again = any(tuned.adapter(name).method.restarts for name in tuned.active)
    shares = [restarted(usual, g["born"], steps) if g.get("born") and again else usual for g in optimizer.param_groups]
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        if "initial_lr" not in group:
            group["initial_lr"] = group["lr"]
            group["lr"] = group["lr"] * share(inner.last_epoch)
    inner.lr_lambdas = shares
    inner.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    inner._last_lr = [group["lr"] for group in optimizer.param_groups]


def grows(tuned: Tuned) -> bool:
    """Whether a method in use takes on tensors while it trains."""
    return any(tuned.adapter(name).method.traits.grows for name in tuned.active)


def check_growth(tuned: Tuned, args: TrainingArguments) -> None:
    """Refuse ways of training that fix at the start what trains.

    Raises:
        CannotMix: several processes, FSDP, DeepSpeed.
    """
    if args.fsdp or args.deepspeed or args.world_size > 1:
        raise CannotMix(
            f"{_name(tuned)} takes on tensors while it trains, which several processes, FSDP and DeepSpeed do not "
            "follow; train in one process"
        )


def _name(tuned: Tuned) -> str:
    return next(m.name() for m in (tuned.adapter(n).method for n in tuned.active) if m.traits.grows)
