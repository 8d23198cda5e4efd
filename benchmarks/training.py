"""One optimizer step, repeated: Pegbox's and PEFT's side of every method that both have, and Pegbox's other methods."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.models import ALPHA, RANK, batch, linear_bytes, llama

LEARNING_RATE = 1e-4
PROMPT_TOKENS = 20  # of prompts, and pairs a layer of prefixes
SCORES = "_scores"  # a growing method, in steps in which it asks which layers matter
IN_TURN, MOST_STEPS = ("lisa", f"increlora{SCORES}"), 100

# the weight-space family, about as many trained numbers each as LoRA of rank 16 has
FAMILY: dict[str, dict[str, Any]] = {
    "eva": {"rank": RANK, "alpha": ALPHA},
    "nlora": {"rank": RANK, "alpha": ALPHA},
    "loldu": {"rank": 4 * RANK, "alpha": ALPHA},
    "more": {"rank": RANK},
    "monarch": {},
    "increlora": {"first": RANK, "rank": RANK, "reserve": False},
    f"increlora{SCORES}": {"first": RANK, "rank": RANK + 1, "reserve": False, "wait": 0, "every": 1000, "beta": 0.999},
    "triadaptlora": {"first": RANK, "rank": RANK},
    "diffora": {"rank": RANK, "alpha": ALPHA},
    "gradnormlorp": {"rank": RANK, "alpha": ALPHA},
    "mola": {"rank": RANK // 4, "experts": 4},
    "mhr": {"rank": RANK // 4, "skills": 4},
    "meteora": {"ranks": (RANK // 4,) * 4, "train": "all", "targets": "all-linear"},
    "mtlora": {"rank": RANK},
}

Loss = Callable[[], Tensor]
Side = Callable[[nn.Module, str], tuple[nn.Module, Loss]]


def measure(library: str, method: str, dtype: str, steps: int, forward: bool) -> dict[str, Any]:
    """Seconds of `steps` optimizer steps after one to warm up, the peak memory until then, and the forward's seconds.

    The forward alone is the base's, without adapters, with its own loss and without gradients; it is timed last, so
    that its logits do not count as the step's memory.

    Args:
        library: `pegbox` or `peft`.
        forward: whether to time the forward too.
    """
    model = llama(dtype, biases=method == "bitfit").train()
    linears = linear_bytes(model)
    side: Side = {"pegbox": _pegbox, "peft": _peft}[library]
    before = memory.resident()
    memory.forget_peak()
    tuned, loss = side(model, method)
    own = tuned.method.optimizer(tuned.groups(LEARNING_RATE)) if library == "pegbox" else None  # type: ignore[operator, union-attr]
    optimizer = own or torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)
    step = _stepper(loss, optimizer, _turns(tuned, optimizer) if method in IN_TURN else None)
    first = step()
    seconds = [_timed(step) for _ in range(steps)]
    peak = memory.peak()
    alone = {"forward": min(_timed(_base_forward(library, tuned)) for _ in range(3))} if forward else {}
    return alone | {
        "step": statistics.median(seconds),
        "steps": seconds,
        "peak": peak,
        "above_model": peak - before,
        "first_loss": first,
        "trained": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "optimizer": _held(optimizer),
        "linears": linears,
    }


def _stepper(
    loss: Loss, optimizer: torch.optim.Optimizer, before: Callable[[], None] | None = None
) -> Callable[[], float]:
    def step() -> float:
        if before is not None:
            before()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def _turns(tuned: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What comes before each step of a method that acts between steps; those measured are of one turn, or growth."""
    import pegbox

    acts, steps = pegbox.Callback(tuned, save=False), itertools.count()
    return lambda: acts.before_step(next(steps), MOST_STEPS, optimizer)


def _held(optimizer: torch.optim.Optimizer) -> float:
    """What an optimizer keeps between steps, MiB."""
    kept = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in kept) / 2**20


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _base_forward(library: str, tuned: Any) -> Callable[[], Any]:
    data = batch()
    disabled = tuned.disabled if library == "pegbox" else tuned.disable_adapter

    @torch.no_grad()
    def forward() -> Any:
        with disabled():
            return (tuned.model if library == "pegbox" else tuned)(**data, use_cache=False).loss.item()

    return forward


# -- the two sides -------------------------------------------------------------------------------------------------


def _pegbox(model: nn.Module, method: str) -> tuple[nn.Module, Loss]:
    import pegbox
    from pegbox import objectives

    settings: dict[str, dict[str, Any]] = {
        "lora": {"rank": RANK, "alpha": ALPHA},
        "dora": {"rank": RANK, "alpha": ALPHA},
        "miss": {"rank": RANK},
        "bitfit": {"targets": "all-linear"},
        "ia3": {},
        "prompt_tuning": {"tokens": PROMPT_TOKENS},
        "p_tuning": {"tokens": PROMPT_TOKENS},
        "prefix_tuning": {"tokens": PROMPT_TOKENS},
        "s2ft": {"down": 0.03},
        "full": {},
        "lisa": {"active": 2, "period": MOST_STEPS},
        **FAMILY,
    }
    tuned = pegbox.tune(model, method.removesuffix(SCORES), **settings[method])
    objective, data = objectives.get("causal_lm"), batch()

    def loss() -> Tensor:
        losses = [*objective(tuned, data).values(), *tuned.extra_losses().values()]
        return torch.stack(losses).sum()

    return tuned, loss


def _peft(model: nn.Module, method: str) -> tuple[nn.Module, Loss]:
    from peft import get_peft_model

    tuned, data = get_peft_model(model, _peft_config(method)), batch()
    return tuned, lambda: tuned(**data, use_cache=False).loss


def _peft_config(method: str) -> Any:
    """BEFT, a trained vector added to the output of each linear, is PEFT's nearest to BitFit: the same parameters.

    `LoraConfig(bias="all")` trains biases only beside LoRA factors, and LN tuning trains norms.
    """
    from peft import (
        BeftConfig,
        IA3Config,
        LoraConfig,
        MissConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TaskType,
    )

    linears: dict[str, Any] = {"target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
    virtual: dict[str, Any] = {"num_virtual_tokens": PROMPT_TOKENS, "task_type": TaskType.CAUSAL_LM}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(r=RANK, lora_alpha=int(ALPHA), **linears),
        "dora": lambda: LoraConfig(r=RANK, lora_alpha=int(ALPHA), use_dora=True, **linears),
        "miss": lambda: MissConfig(r=RANK, **linears),
        "bitfit": lambda: BeftConfig(**linears),
        "ia3": lambda: IA3Config(task_type=TaskType.CAUSAL_LM),
        "prompt_tuning": lambda: PromptTuningConfig(**virtual),
        "p_tuning": lambda: PromptEncoderConfig(**virtual),
        "prefix_tuning": lambda: PrefixTuningConfig(**virtual),
    }
    return makers[method]()
