"""The spike guard: a batch that throws the loss off is rejected; if the next do too, the run goes back and skips data.

    spike at t  <=>  loss_t > mean + sigmas * std    or    norm_t > factor * median    or    either is not finite

over the last `window` losses and gradient norms that were no spikes, once there are so many.  What is done is that of
Wu et al., "GEB-1.3B: Open Lightweight Large Language Model", 2024 (arXiv 2406.09900): the offending batch is left out;
then training goes back before the spike and skips data around it.  A rejected batch makes no update and moves no
schedule; an iteration is added for it, so that a run makes all the updates that it was to make.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pegbox.core.errors import Diverged
from pegbox.core.sharded import own_part
from pegbox.pretrain.settings import GuardSettings

SPIKES = "spikes.jsonl"


@dataclass
class History:
    """Losses and gradient norms of the last accepted iterations, and how many in a row were rejected."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rejected: int = 0

    def accept(self, loss: float, norm: float, window: int) -> None:
        self.losses = [*self.losses, loss][-window:]
        self.norms = [*self.norms, norm][-window:]
        self.rejected = 0


def spike(history: History, loss: float, norm: float, settings: GuardSettings) -> str | None:
    """Why an iteration is a spike; None if it is none."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"loss {loss}, gradient norm {norm}"
    if len(history.losses) == settings.window:
        mean, deviation = statistics.fmean(history.losses), statistics.pstdev(history.losses)
        if loss > mean + settings.sigmas * deviation:
            return f"loss {loss:.4g} against {mean:.4g} with standard deviation {deviation:.3g}"
    if len(history.norms) == settings.window:
        median = statistics.median(history.norms)
        if norm > settings.norm * median:
            return f"gradient norm {norm:.4g} against a median of {median:.3g}"
    return None


@dataclass(frozen=True)
class Skip:
    """Iterations from number `start` (from 0) on read data `count` iterations further on than before."""

    start: int
    count: int


def position(index: int, rows: int, skips: list[Skip]) -> int:
    """The row of data behind row `index` of the run: a pure function, so that a run resumes to the same data.

    Args:
        rows: of an iteration, in all processes.
    """
    return index + rows * sum(skip.count for skip in skips if skip.start <= index // rows)


class Guard(TrainerCallback):
    """Watches the iterations of `pegbox.pretrain.engine`, which tells it loss and norm (`saw`) before it asks.

    Its state is part of each checkpoint, so that a resumed run decides as an uninterrupted one.  What it goes back to
    is in memory: taken every `snapshot` iterations, with each checkpoint, and when a run starts.  Every process decides
    alike, since all are told the same numbers.

    Args:
        settings: what a spike is.
        folder: where spikes.jsonl is written.
        say: prints a line.

    Raises:
        Diverged: in training, when it has gone back as often as it may.
    """

    def __init__(self, settings: GuardSettings, folder: Path, say: Callable[[str], None]) -> None:
        self.settings, self.path, self.say = settings, folder / SPIKES, say
        self.history, self.skips = History(), list[Skip]()
        self.times = 0  # that it went back
        self._seen = (0.0, 0.0)
        self._snapshot: Snapshot | None = None
        self._put: Callable[[Mapping[str, Any]], None] | None = None  # what the end of a spike's iteration does

    def saw(self, loss: float, norm: float) -> None:
        """Loss and gradient norm of the iteration under way, over all processes."""
        self._seen = (loss, norm)

    def export(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        return {"times": self.times, "skips": [asdict(s) for s in self.skips], "history": asdict(self.history)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `export` gave."""
        self.times, self.history = state["times"], History(**state["history"])
        self.skips[:] = [Skip(**skip) for skip in state["skips"]]

    # -- the trainer's events ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.max_steps = args.max_steps + state.global_step - kwargs["lr_scheduler"].last_epoch
        if state.is_world_process_zero:
            self._forget_after(state.global_step)
        self._take(state, kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide; the gradients of a spike are taken away, so that the optimizer does nothing."""
        why = spike(self.history, *self._seen, self.settings)
        if why is None:
            self.history.accept(*self._seen, self.settings.window)
            return
        for group in kwargs["optimizer"].param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        schedule = kwargs["lr_scheduler"].state_dict()
        if self.history.rejected < self.settings.rejects:
            self.history.rejected += 1
            self._put = partial(_put_schedule, schedule=schedule)
            self._note(state, why, "batch rejected", {"did": "rejected"})
        else:
            schedule = self._go_back(state, why)
        # the updates that are still to be made; set here, as the trainer looks before `on_step_end`
        state.max_steps = args.max_steps + state.global_step + 1 - schedule["last_epoch"]

    def _go_back(self, state: Any, why: str) -> dict[str, Any]:
        """Say so, and skip data from the next iteration on; the schedule that is gone back to."""
        assert self._snapshot is not None
        if self.times == self.settings.rollbacks:
            raise Diverged(
                f"step {state.global_step + 1}: {why}; going back {self.times} times did not help. The last checkpoint "
                "is as it was; lower train.learning_rate, look at the data, or raise guard.sigmas and guard.norm"
            )
        self.times += 1
        self.skips.append(Skip(state.global_step + 1, self.settings.skip))
        self._put = self._snapshot.put_back
        # norms are counted anew: where the snapshot itself lies in a steep place, every batch has a large one there
        self.history = History(self._snapshot.losses)
        to, skipped = self._snapshot.schedule["last_epoch"], self.settings.skip
        told = f"went back to the weights after {to} updates, and skips {skipped} batches"
        self._note(state, why, told, {"did": "went back", "updates": to, "skipped": skipped})
        return self._snapshot.schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._put is not None:
            self._put(kwargs)
            self._put = None
        elif state.global_step % self.settings.snapshot == 0:
            self._take(state, kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take(state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._snapshot = None

    def _take(self, state: Any, kwargs: Mapping[str, Any]) -> None:
        self._snapshot = Snapshot.of(kwargs, self.history.losses)

    # -- what is written -----------------------------------------------------------------------------------------------

    def _note(self, state: Any, why: str, told: str, did: Mapping[str, Any]) -> None:
        if state.is_world_process_zero:
            step = state.global_step + 1
            loss, norm = (value if math.isfinite(value) else None for value in self._seen)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "loss": loss, "grad_norm": norm, "why": why, **did}) + "\n")
            self.say(f"spike at step {step}: {why}; {told}")

    def _forget_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after its checkpoint."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(kept))


# -- what it goes back to --------------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    """Weights, optimizer state and schedule, on the CPU; of a sharded model each process keeps its part."""

    parameters: list[Tensor]
    states: list[dict[str, Any]]  # of the optimizer, for each parameter
    schedule: dict[str, Any]
    losses: list[float]  # of the guard's history

    @staticmethod
    def of(kwargs: Mapping[str, Any], losses: list[float]) -> Snapshot:
        """From what a trainer gives its callbacks."""
        parameters, state = _parameters(kwargs), kwargs["optimizer"].state
        states = [{name: _copy(value) for name, value in state.get(p, {}).items()} for p in parameters]
        schedule = kwargs["lr_scheduler"].state_dict()
        return Snapshot([_copy(p) for p in parameters], states, schedule, losses)

    @torch.no_grad()
    def put_back(self, kwargs: Mapping[str, Any]) -> None:
        """Into the same model, optimizer and schedule."""
        state = kwargs["optimizer"].state
        for parameter, value, kept in zip(_parameters(kwargs), self.parameters, self.states, strict=True):
            own_part(parameter).copy_(value)
            if not kept:
                state.pop(parameter, None)  # it had made no step yet
            for name, held in kept.items():
                if isinstance(held, Tensor):
                    own_part(state[parameter][name]).copy_(held)
                else:
                    state[parameter][name] = held
        _put_schedule(kwargs, self.schedule)


def _parameters(kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [p for group in kwargs["optimizer"].param_groups for p in group["params"]]


def _put_schedule(kwargs: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    kwargs["lr_scheduler"].load_state_dict(schedule)
    for group, rate in zip(kwargs["optimizer"].param_groups, schedule["_last_lr"], strict=True):
        group["lr"] = rate


def _copy(value: Any) -> Any:
    return own_part(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
