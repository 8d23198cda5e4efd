"""Training tensors in turn: what an optimizer holds of those that rest, and where turns cannot be taken.

A method whose `traits.in_turn` is set chooses before each step which of its tensors train (`tuned.select`).  Adam's two
moments of the others would stay allocated, and be stale when they come back.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from pegbox.core import Tuned
from pegbox.core.errors import CannotMix, MethodError, SettingsError
from pegbox.train.reentrant import is_reentrant


def free_resting(tuned: Tuned, optimizer: torch.optim.Optimizer | None) -> None:
    """Drop the state of every parameter that rests; one that comes back starts anew, bias corrections included.

    Args:
        optimizer: over all of `tuned.groups()`, or what a trainer has wrapped around it.

    Raises:
        MethodError: no optimizer, or one that lacks parameters whose turn it is or will be.
    """
    if optimizer is None:
        raise MethodError(
            f"{_name(tuned)} trains its tensors in turn, and what the optimizer holds of the others is freed: "
            "before_step(step, steps, optimizer)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = [(name, p) for group in tuned.groups(0.0) for name, p in zip(group["names"], group["params"], strict=True)]
    missing = [name for name, p in wanted if id(p) not in held]
    if missing:
        raise MethodError(
            f"{_name(tuned)} trains its tensors in turn, and the optimizer has {len(wanted) - len(missing)} of "
            f"{len(wanted)}, not {missing[0]!r}; make it from tuned.groups(lr)"
        )
    for _, parameter in wanted:
        if not parameter.requires_grad:
            optimizer.state.pop(parameter, None)


def check_arguments(tuned: Tuned, args: TrainingArguments) -> None:
    """Refuse ways of training in which what trains cannot change.

    DistributedDataParallel can, where it looks for parameters without a gradient, as it does for a `Tuned` by default.

    Raises:
        SettingsError: it is told not to look.  CannotMix: FSDP and DeepSpeed, which fix at the start what trains.
    """
    sharded = "FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed else None
    if sharded:
        raise CannotMix(f"{_name(tuned)} trains its tensors in turn, which {sharded} cannot do; use DDP or one process")
    if args.world_size > 1 and args.ddp_find_unused_parameters is False:
        raise SettingsError(
            f"{_name(tuned)} trains its tensors in turn, so ddp_find_unused_parameters must be True, got False"
        )
    if args.world_size > 1 and is_reentrant(args):
        raise SettingsError(
            f"{_name(tuned)} trains its tensors in turn, which DDP does not combine with reentrant checkpointing; "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def takes_turns(tuned: Tuned) -> bool:
    """Whether a method in use changes which of its tensors train."""
    return any(tuned.adapter(name).method.traits.in_turn for name in tuned.active)


def all_again(tuned: Tuned) -> None:
    """Nothing rests any more, as before the first step."""
    for name in tuned.active:
        tuned.select(None, name)


def _name(tuned: Any) -> str:
    return next(m.name() for m in (tuned.adapter(n).method for n in tuned.active) if m.traits.in_turn)
