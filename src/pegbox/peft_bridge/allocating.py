"""Tuners that choose, while they train, what of them is left: AdaLoRA's ranks, AdaMSS's subspaces.

PEFT decides after every step, from running averages of |w * gradient| that it keeps outside of every state; here a
checkpoint holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core import Tuned
from pegbox.core.adapter import Adapter
from pegbox.peft_bridge.harvest import ADAPTER, mounted
from pegbox.peft_bridge.method import PeftMethod, State, bank_of, layers_of

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of RankAllocator, by name of a parameter
LISTS = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")  # of AdamssLayer, one item a subspace
PATTERN, OWN, RESTS = "rank_pattern", "own", "rests"
ROOT = "base_model.model."  # before a path in PEFT's files


class Allocating(PeftMethod):
    """Base of both."""

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        for adapter in self._of(tuned):
            bank = bank_of(adapter)
            self._told(bank.config, steps)
            with mounted(tuned.model, bank, layers_of(adapter)):
                bank.tuner[0].update_and_allocate(step)  # type: ignore[operator]

    def _told(self, config: Any, steps: int) -> None:
        """Say how many steps there are, to a tuner that must know."""

    def _of(self, tuned: Tuned) -> list[Adapter]:
        """The adapters in use that this method trains."""
        return [a for a in map(tuned.adapter, tuned.active) if a.method is self]


class Ranks(Allocating):
    """AdaLoRA: W + B diag(E) A, where E is set to zero at the ranks that matter least."""

    def own_values(self) -> dict[str, Any]:
        return {"total_step": 10**9} if self._counts else {}

    @property
    def _counts(self) -> bool:
        """Whether the number of steps is the run's."""
        return getattr(self, "total_step", None) is None

    def _told(self, config: Any, steps: int) -> None:
        if self._counts:
            config.total_step = steps

    def penalty(self, tuned: Tuned) -> Tensor | None:
        """How far its factors are from orthogonal, as PEFT's model class adds it to the loss."""
        weight = getattr(self, "orth_reg_weight", 0.0)
        if not weight:
            return None
        factors = [
            p if "lora_A" in key else p.T
            for adapter in self._of(tuned)
            for key, p in adapter.own().items()
            if "lora_A" in key or "lora_B" in key
        ]
        return weight * torch.stack([(f @ f.T - torch.eye(len(f), device=f.device)).norm() for f in factors]).mean()

    def from_file(self, model: nn.Module, adapter: Adapter, tensors: State) -> State:
        """The ranks that PEFT leaves out of a file are there again, and zero, so that shapes never change."""
        config = bank_of(adapter).config
        before, config.rank_pattern = config.rank_pattern, None
        try:
            names, _ = self._file_names(model, adapter)
            own = {theirs: adapter.own_state()[ours].detach() for theirs, ours in names.items()}
            whole = {key: _whole(key, value, own[key]) if key in own else value for key, value in tensors.items()}
            state = super().from_file(model, adapter, whole)
        except Exception:
            config.rank_pattern = before
            raise
        kept = {key.removeprefix(ROOT): _first(len(tensors[key]), len(own[key])) for key in own if "lora_E" in key}
        if not all(all(ranks) for ranks in kept.values()):
            config.rank_pattern = kept
        return state

    def training_state(self, adapter: Adapter) -> State:
        """The averages, which ranks are left, and what the file has no longer: factors of those that are not."""
        bank = bank_of(adapter)
        allocator: Any = bank.tuner[0].rankallocator
        averages = {f"{kind}/{name}": value for kind in AVERAGES for name, value in getattr(allocator, kind).items()}
        pattern = {f"{PATTERN}/{name}": torch.tensor(ranks) for name, ranks in (bank.config.rank_pattern or {}).items()}
        return averages | pattern | {f"{OWN}/{key}": value.detach() for key, value in adapter.own_state().items()}

    @torch.no_grad()
    def load_training_state(self, adapter: Adapter, state: State) -> None:
        bank = bank_of(adapter)
        allocator: Any = bank.tuner[0].rankallocator
        for kind in AVERAGES:
            setattr(allocator, kind, _under(kind, state))
        pattern = {name: ranks.tolist() for name, ranks in _under(PATTERN, state).items()}
        bank.config.rank_pattern = pattern or None
        saved = _under(OWN, state)
        for key, value in adapter.own_state().items():
            value.copy_(saved[key])


class Subspaces(Allocating):
    """AdaMSS: a factor pair for each subspace of a matrix, of which those that matter least stop training."""

    def after_step(self, tuned: Tuned, step: int, steps: int) -> None:
        super().after_step(tuned, step, steps)
        for adapter in self._of(tuned):
            own = adapter.own()
            adapter.resting = frozenset(key for key in adapter.trained if not own[key].requires_grad)

    def training_state(self, adapter: Adapter) -> State:
        """The averages, and which parameters rest; nothing where every subspace trains throughout."""
        if not getattr(self, "use_asa", False):
            return {}
        lists = {
            f"{kind}/{path}/{index}": value
            for path, layer in layers_of(adapter).items()
            for kind in LISTS
            for index, value in enumerate(getattr(layer, kind)[ADAPTER])
            if value is not None
        }
        return lists | {f"{RESTS}/{key}": torch.tensor(key in adapter.resting) for key in sorted(adapter.trained)}

    def load_training_state(self, adapter: Adapter, state: State) -> None:
        for path, layer in layers_of(adapter).items():
            for kind in LISTS:
                listed: list[Tensor | None] = getattr(layer, kind)[ADAPTER]
                listed[:] = [state.get(f"{kind}/{path}/{index}") for index in range(len(listed))]
        adapter.resting = frozenset(key for key, rests in _under(RESTS, state).items() if rests)
        for key, parameter in adapter.own().items():
            parameter.requires_grad_(key in adapter.trained - adapter.resting)


def _whole(key: str, value: Tensor, own: Tensor) -> Tensor:
    """A tensor with as many ranks as the adapter's own: E's further ones are zero, those of A and B its own."""
    axis = 1 if "lora_B" in key else 0
    if "lora_" not in key or value.ndim != own.ndim or value.shape[axis] >= own.shape[axis]:
        return value
    rest = own.narrow(axis, value.shape[axis], own.shape[axis] - value.shape[axis]).to(value)
    other = value.shape[1 - axis] != own.shape[1 - axis]
    return value if other else torch.cat([value, torch.zeros_like(rest) if "lora_E" in key else rest], dim=axis)


def _first(some: int, all_: int) -> list[bool]:
    return [True] * some + [False] * (all_ - some)


def _under(kind: str, state: State) -> State:
    """The part of a state beneath a word."""
    return {key.removeprefix(f"{kind}/"): value for key, value in state.items() if key.startswith(f"{kind}/")}
