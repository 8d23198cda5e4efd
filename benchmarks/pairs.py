"""What is measured against what, and the bars."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.measure import fresh
from benchmarks.models import DTYPES
from benchmarks.ratios import Bar, Round, curve_gap, ratio, value

SPEED = ratio("theirs.step", "ours.step")
MEMORY = ratio("ours.peak", "theirs.peak")
ABOVE_MODEL = ratio("ours.above_model", "theirs.above_model")
FORWARDS = ratio("ours.step", "ours.forward")


@dataclass(frozen=True)
class Pair:
    """Two measurements that are repeated in turn, ours first.

    Attributes:
        kind: the module that measures.
        ours, theirs: arguments of its `measure`; `theirs` is None where there is nothing to compare with.
        same: a key whose values must agree between the sides, or the comparison is void.
        seeded: give each round a seed of its own.
    """

    name: str
    title: str
    kind: str
    ours: dict[str, Any]
    theirs: dict[str, Any] | None
    bars: tuple[Bar, ...]
    rounds: int = 2
    same: str | None = None
    seeded: bool = False
    note: str = field(default="", compare=False)


def run(pair: Pair, say: Callable[[str], None]) -> dict[str, Any]:
    """All rounds of a pair, and what they were run on.

    Raises:
        RuntimeError: a measurement failed, or the two sides did not compute the same.
    """
    load, rounds = machine.load(), []
    for i in range(pair.rounds):
        seed = {"seed": i} if pair.seeded else {}
        say(f"{pair.name}: round {i + 1} of {pair.rounds}")
        done: Round = {"ours": fresh(pair.kind, pair.ours | seed)}
        if pair.theirs is not None:
            done["theirs"] = fresh(pair.kind, pair.theirs | seed)
        _check_same(pair, done)
        rounds.append(done)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"rounds": rounds, "date": today, "load_before": round(load, 2), "machine": machine.facts()}


def _check_same(pair: Pair, done: Round) -> None:
    if pair.same is None:
        return
    ours, theirs = done["ours"][pair.same], done["theirs"][pair.same]
    if not _agree(ours, theirs):
        raise RuntimeError(f"{pair.name} compares unlike things: {pair.same} is {ours} on our side, {theirs} on theirs")


def _agree(ours: Any, theirs: Any) -> bool:
    """Numbers to a thousandth; of a list of tokens all but one, since bfloat16 rounds near ties either way."""
    if isinstance(ours, list):
        return sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1
    return math.isclose(ours, theirs, rel_tol=1e-3)


# -- the list --------------------------------------------------------------------------------------------------------


def _training(
    method: str, dtype: str, title: str, bars: tuple[Bar, ...], *, steps: int = 1, forward: bool = False, **more: Any
) -> Pair:
    shared = {"method": method, "dtype": dtype, "steps": steps, "forward": forward}
    return Pair(
        f"{method.replace('_tuning', '')}-{dtype}",
        f"{title}, {dtype}",
        "training",
        {"library": "pegbox", **shared},
        {"library": "peft", **shared},
        (*bars, Bar("peak memory above the model, of PEFT's", ABOVE_MODEL)),
        **more,
    )


def _against_peft(speed: float, memory: float) -> tuple[Bar, ...]:
    return (
        Bar("speed, times PEFT's", SPEED, at_least=speed),
        Bar("peak memory, of PEFT's", MEMORY, at_most=memory),
    )


def _loras() -> list[Pair]:
    step = "time of a step, in forwards"
    settings: dict[str, Any] = {"steps": 2, "forward": True, "rounds": 3, "same": "first_loss"}
    half, single = Bar(step, FORWARDS, at_most=2.8), Bar(step, FORWARDS)
    return [
        _training("lora", "bf16", "LoRA", (*_against_peft(1.5, 0.6), half), **settings),
        _training("lora", "fp32", "LoRA", (*_against_peft(1.0, 0.7), single), **settings),
    ]


def _others() -> list[Pair]:
    bars = _against_peft(1.0, 1.0)
    return [
        _training(method, dtype, title, bars, same=same, note=note)
        for method, title, same, note in (
            ("dora", "DoRA", "first_loss", ""),
            ("miss", "MiSS", "first_loss", ""),
            ("bitfit", "BitFit", "first_loss", BITFIT),
            ("prompt_tuning", "Prompt tuning, 20 tokens", None, ""),
        )
        for dtype in DTYPES
    ]


BITFIT = (
    "PEFT's nearest to BitFit is BEFT, which adds a trained vector to the output of each linear: the same function "
    "and the same number of parameters. `LoraConfig(bias='all')` trains biases only beside LoRA's factors, LN tuning "
    "trains norms instead. The Llama has biases in attention and MLP here."
)
CHAT = (
    "dolly_3k's first conversations with the chatml template, loss on the assistant's turns, eight conversations a "
    "step in the same order, constant learning rate 1e-3; PEFT's side pads the eight to the longest, Pegbox's packs "
    "them into one row. Both train through their Trainer. The gap is the mean distance between the two libraries' "
    "loss curves in units of the distance between PEFT's own runs from different seeds."
)
DECODING = (
    "Greedy decoding with a KV cache after prompts of 64 tokens, 32 tokens a row. Switching decodes each row to its "
    "end after one `tuned.use`, the kindest way to switch."
)


def _chat() -> Pair:
    shared = {"dtype": machine.best_dtype(), "steps": 8}
    return Pair(
        "chat",
        f"dolly_3k end to end, {machine.best_dtype()}",
        "chat",
        {"library": "pegbox", **shared},
        {"library": "peft", **shared},
        (
            Bar(
                "supervised tokens a second, times PEFT's",
                ratio("ours.tokens_per_second", "theirs.tokens_per_second"),
                at_least=3.5,
            ),
            Bar("gap between the loss curves, in seeds' gaps", curve_gap("losses"), at_most=1.5),
            Bar("tokens that padding makes of one", value("ours.padding")),
        ),
        rounds=3,
        seeded=True,
        same="supervised",
        note=CHAT,
    )


def _decoding(dtype: str) -> Pair:
    return Pair(
        f"rows-{dtype}",
        f"Eight adapters in one batch, {dtype}",
        "decoding",
        {"how": "mixed", "dtype": dtype},
        {"how": "switched", "dtype": dtype},
        (
            Bar(
                "tokens a second, times switching's",
                ratio("ours.tokens_per_second", "theirs.tokens_per_second"),
                at_least=4.0,
            ),
        ),
        rounds=3,
        same="first_tokens",
        note=DECODING,
    )


def _starting() -> Pair:
    return Pair(
        "start",
        "Starting up",
        "starting",
        {},
        None,
        (
            Bar("`import pegbox`, seconds", value("ours.import"), at_most=0.2),
            Bar("`pegbox --help`, seconds", value("ours.help"), at_most=0.3),
            Bar("either imports torch", value("ours.torch"), at_most=0),
        ),
        rounds=3,
    )


def pairs() -> dict[str, Pair]:
    """Every pair by name, in the order of the report."""
    return {pair.name: pair for pair in (*_loras(), *_others(), _chat(), *map(_decoding, DTYPES), _starting())}
