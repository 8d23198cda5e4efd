"""Any method of Pegbox in a plain HF Trainer, a TRL trainer, or a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pegbox.core import Method, Tuned
from pegbox.core.calibration import Data, Loss
from pegbox.core.errors import MethodError
from pegbox.core.headless import unwrap
from pegbox.train.agreement import take_the_firsts
from pegbox.train.bypass import check_nothing_is_bypassed
from pegbox.train.growth import Share, check_growth, follow_growth, follow_schedule, grows, schedule_of
from pegbox.train.own_state import only_adapters
from pegbox.train.quantised import allow_quantised
from pegbox.train.reentrant import drop_own_hooks, is_reentrant, require_input_grads
from pegbox.train.turns import all_again, check_arguments, free_resting, takes_turns


class Callback(TrainerCallback):
    """Lets the methods of a tuned model act between steps, and saves its adapters.

        trainer = transformers.Trainer(model=tuned, callbacks=[pegbox.Callback(tuned)], ...)

    Each checkpoint, and at the end the output folder, gets the adapter; the frozen base is left out of what the
    trainer itself writes.  In such a trainer a method's penalty and its own optimizer do not act by themselves: add
    `tuned.penalty()` to the loss and pass `optimizers=(torch.optim.AdamW(tuned.groups(lr)), None)`, or use
    `pegbox.Trainer`, which does both.  In a loop of one's own:

        acts = pegbox.Callback(tuned)
        for step, batch in enumerate(batches):
            acts.before_step(step, steps, optimizer)
            (tuned(**batch).loss + tuned.penalty()).backward()
            optimizer.step()
            acts.after_step(step, steps)
            optimizer.zero_grad()

    Args:
        tuned: the model that the trainer trains.
        save: False leaves saving to the trainer.
    """

    def __init__(self, tuned: Tuned, *, save: bool = True) -> None:
        if not isinstance(tuned, Tuned):
            raise MethodError(
                f"what trains an adapter takes a tuned model, got a {type(tuned).__name__}; "
                "tuned = pegbox.tune(model, 'lora') makes one"
            )
        self.tuned, self.save = tuned, save
        self._calibrated = False
        self._reentrant: RemovableHandle | None = None
        self._grown = False  # whether the last `before_step` took on tensors
        self._schedule: Share | None = None  # of a growing adapter, before anything was born
        allow_quantised(tuned)
        if save:
            only_adapters(tuned)

    # -- the verbs, for a loop of one's own ------------------------------------------------------------------------

    @property
    def methods(self) -> list[Method]:
        """The methods of the adapters in use."""
        return [self.tuned.adapter(name).method for name in self.tuned.active]

    def calibrate(self, batches: Iterable[Mapping[str, Any]], loss: Loss | None = None) -> None:
        """Let methods look at data; before an optimizer is made, since they may choose what trains.

        Of several processes each looks at its own batches, and all go on from what the first has found.

        Args:
            batches: as the model takes them.
            loss: of the model on a batch; that of the model's output if None.
        """
        data = Data(batches, loss)
        for method in self.methods:
            method.calibrate(self.tuned, data)
        take_the_firsts(self.tuned)
        self._calibrated = True

    def before_step(self, step: int, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Before the forward of optimizer step `step` (from 0) of `steps`.

        Args:
            optimizer: of the loop; what it holds of tensors that rest is freed, where a method trains its tensors in
                turn, and it is given those that a growing method takes on.

        Raises:
            MethodError: there is such a method, and no optimizer, or one that was not made from `tuned.groups`.
        """
        before = self.methods
        for method in before:
            method.before_step(self.tuned, step, steps)
        if takes_turns(self.tuned):
            free_resting(self.tuned, optimizer)
        self._grown = any(now is not then for now, then in zip(self.methods, before, strict=True))
        if self._grown or (optimizer is None and grows(self.tuned)):
            follow_growth(self.tuned, optimizer)

    def after_step(self, step: int, steps: int) -> None:
        """After optimizer step `step`; the gradients are still there."""
        for method in self.methods:
            method.after_step(self.tuned, step, steps)

    @property
    def needs_data(self) -> bool:
        """Whether a method in use looks at data before training, and has not yet."""
        return not self._calibrated and any(m.calibrates() for m in self.methods)

    def close(self) -> None:
        """Take off what training put on the model; nothing rests any more."""
        all_again(self.tuned)
        if self._reentrant is not None:
            self._reentrant.remove()
            self._reentrant = None

    # -- the trainer's events ----------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if unwrap(model) is not self.tuned.model or model is self.tuned.model:
            raise MethodError(
                f"the trainer trains {type(model).__name__}, not the tuned model of this callback; pass model=tuned"
            )
        # the trainer would keep the columns that Tuned.forward names, which are none but the labels
        args.remove_unused_columns = False
        if takes_turns(self.tuned):
            check_arguments(self.tuned, args)
            all_again(self.tuned)  # where an earlier run was broken off
        if grows(self.tuned):
            check_growth(self.tuned, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.needs_data and not state.global_step:
            names = ", ".join(m.name() for m in self.methods)
            raise MethodError(
                f"{names} looks at data before training: call calibrate(batches) on this callback before the trainer "
                "is made, or use pegbox.Trainer"
            )
        check_nothing_is_bypassed(self.tuned)
        if grows(self.tuned):
            self._schedule = schedule_of(kwargs["lr_scheduler"])
            self._follow_schedule(state, kwargs)
        if args.gradient_checkpointing:
            drop_own_hooks(self.tuned.model)
        if is_reentrant(args):
            self._reentrant = require_input_grads(self.tuned.model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before_step(state.global_step, state.max_steps, kwargs.get("optimizer"))
        if self._grown:
            self._follow_schedule(state, kwargs)

    def _follow_schedule(self, state: TrainerState, kwargs: dict[str, Any]) -> None:
        if self._schedule is not None:
            scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
            follow_schedule(self.tuned, scheduler, self._schedule, optimizer, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.after_step(state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.save and state.is_world_process_zero:
            assert args.output_dir is not None
            save_adapters(self.tuned, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if self.save and state.is_world_process_zero:
            assert args.output_dir is not None
            save_adapters(self.tuned, Path(args.output_dir))


def save_adapters(tuned: Tuned, folder: Path, *, writes: bool = True, **extra: Any) -> None:
    """Write the adapters in use: into `folder`, or, where they are several, each into a folder of its name there.

    Args: as of `pegbox.core.files.save`.
    """
    from pegbox.core.files import save

    for name, place in places(tuned, folder).items():
        save(tuned, place, name, writes=writes, **extra)


def places(tuned: Tuned, folder: Path) -> dict[str, Path]:
    """The adapters in use, and the folder of each beneath `folder`."""
    lone = len(tuned.active) == 1
    return {name: folder if lone else folder / name for name in tuned.active}
