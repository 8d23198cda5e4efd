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
    for group in tuned.groups(first.get("initial_lr", first["lr"]), decay):
        if new := [(p, n) for p, n in zip(group["params"], group["names"], strict=True) if id(p) not in held]:
            parameters, names = zip(*new, strict=True)
            optimizer.add_param_group(group | {"params": list(parameters), "names": list(names)})


def follow_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Let a schedule of transformers' (a LambdaLR) go through its whole course for each group from its birth on.

    Raises:
        CannotMix: another kind of schedule.
    """
    inner = getattr(scheduler, "scheduler", scheduler)  # of accelerate's wrapper
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise CannotMix(
            f"a growing adapter starts the schedule again for what it takes on, which {type(inner).__name__} cannot "
            "do; use schedule=linear, cosine, constant, or another function of the step"
        )
    usual = inner.lr_lambdas[0]
    for k, group in enumerate(optimizer.param_groups):
        share = restarted(usual, group["born"], steps) if group.get("born") else usual
        if k < len(inner.lr_lambdas):
            inner.lr_lambdas[k] = share
            continue
        inner.lr_lambdas.append(share)
        inner.base_lrs.append(group["lr"])
        group["initial_lr"] = group["lr"]
        group["lr"] = group["lr"] * share(inner.last_epoch)
        inner._last_lr.append(group["lr"])


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
