"""What is measured against what, and the bars."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.measure import fresh
from benchmarks.models import DTYPES, NF4
from benchmarks.ratios import Bar, Reading, Round, curve_gap, ratio, value

SHORT = {"prompt_tuning": "prompt", "prefix_tuning": "prefix", "p_tuning": "p-tuning"}
STEPS = 3  # timed in a round; their median counts, since single steps of a shared machine differ by a fifth
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


def over_all(known: Mapping[str, Pair], results: Mapping[str, Any]) -> list[Reading]:
    """Geometric means over all methods that PEFT has too, of the medians; unmeasured where one of them is."""
    training = [pair for pair in known.values() if pair.kind == "training"]
    against = [pair for pair in training if (pair.theirs or {}).get("library") == "peft"]
    if not against:
        return []
    measured = all(pair.name in results for pair in against)
    readings = []
    for bar in OVER_ALL:
        each = [Reading.of(bar, results[pair.name]["rounds"]) for pair in against] if measured else []
        means = (_mean([r.median for r in each]), _mean([r.low for r in each]), _mean([r.high for r in each]))
        readings.append(Reading(bar, *means))
    return readings


def _mean(values: list[float | None]) -> float | None:
    """Geometric; None of nothing."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


OVER_ALL = (
    Bar("speed, times PEFT's: geometric mean", SPEED, at_least=1.25),
    Bar("peak memory, of PEFT's: geometric mean", MEMORY, at_most=1.0),
)


# -- the list --------------------------------------------------------------------------------------------------------


def _training(
    method: str,
    dtype: str,
    title: str,
    bars: tuple[Bar, ...],
    *,
    steps: int = STEPS,
    forward: bool = False,
    **more: Any,
) -> Pair:
    shared = {"method": method, "dtype": dtype, "steps": steps, "forward": forward}
    return Pair(
        f"{SHORT.get(method, method)}-{dtype}",
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
    settings: dict[str, Any] = {"steps": 5, "forward": True, "rounds": 3, "same": "first_loss"}
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
            ("ia3", "IA3", "first_loss", ""),
            ("prompt_tuning", "Prompt tuning, 20 tokens", None, ""),
            ("p_tuning", "P-tuning, 20 tokens of an MLP", None, ""),
            ("prefix_tuning", "Prefix tuning, 20 pairs a layer", None, ""),
        )
        for dtype in DTYPES
    ]


def _ours(method: str, beside: str, dtype: str, title: str, bars: tuple[Bar, ...], note: str) -> Pair:
    """Two methods of Pegbox."""
    shared = {"library": "pegbox", "dtype": dtype, "steps": STEPS, "forward": False}
    return Pair(
        f"{method}-{dtype}",
        f"{title}, {dtype}",
        "training",
        {"method": method, **shared},
        {"method": beside, **shared},
        (*bars, Bar(f"peak memory above the model, of {beside}'s", ABOVE_MODEL)),
        note=note,
    )


def _selections() -> list[Pair]:
    """Methods that train a selection: of channels beside our LoRA, of blocks beside all of them."""
    step = ratio("ours.step", "theirs.step")
    channels = (
        Bar("time of a step, of our LoRA's", step, at_most=0.9),
        Bar("peak memory, of our LoRA's", MEMORY, at_most=0.9),
    )
    blocks = (
        Bar("time of a step, of full tuning's", step, at_most=0.75),
        Bar(
            "what the optimizer holds, of full tuning's",
            ratio("ours.optimizer", "theirs.optimizer"),
            at_most=0.55,
        ),
    )
    return [
        *(_ours("s2ft", "lora", dtype, "S2FT, 3 % of the MLP's channels", channels, S2FT) for dtype in DTYPES),
        _ours("lisa", "full", "fp32", "LISA, 2 of 12 blocks", blocks, LISA),
    ]


def _family() -> list[Pair]:
    """The weight-space family beside our LoRA of as many trained numbers; routed experts beside a loop over them."""
    bars = (
        Bar("time of a step, of our LoRA's", ratio("ours.step", "theirs.step"), at_most=1.3),
        Bar("trained numbers, of our LoRA's", ratio("ours.trained", "theirs.trained")),
    )
    loop = (
        Bar("times faster than a loop over experts", ratio("theirs.step", "ours.step"), at_least=2.0),
        Bar("of what experts add to the layer's time", ratio("theirs.above", "ours.above")),
    )
    experts = [
        Pair(
            f"experts-{dtype}" if train == "gates" else f"experts-all-{dtype}",
            f"Routed experts, {of}, {dtype}",
            "experts",
            {"how": "product", "train": train, "dtype": dtype, "steps": 41},
            {"how": "loop", "train": train, "dtype": dtype, "steps": 41},
            loop,
            note=EXPERTS,
        )
        for train, of in (("gates", "only their gates train"), ("all", "all of them train"))
        for dtype in DTYPES
    ]
    unbound = (Bar("time of a step, of our LoRA's", ratio("ours.step", "theirs.step")), *bars[1:])
    scores = [_ours("increlora_scores", "lora", dtype, "increlora, scoring", unbound, SCORES) for dtype in DTYPES]
    search = Bar("of a forward pass over the batches it looks at", value("ours.forwards"), at_most=2.0)
    calibration = Pair(
        "calibration", "EVA's search, fp32", "calibration", {}, None, (search, Bar("batches", value("ours.batches")))
    )
    family = (_ours(name, "lora", dtype, name, bars, FAMILY) for name in NAMES for dtype in DTYPES)
    return [*family, *scores, *map(_streams, DTYPES), *experts, calibration]


def _streams(dtype: str) -> Pair:
    """MTLoRA with tasks beside our LoRA, on a hierarchical backbone."""
    shared = {"dtype": dtype, "steps": STEPS}
    return Pair(
        f"mtlora_tasks-{dtype}",
        f"mtlora, four tasks, {dtype}",
        "streams",
        {"method": "mtlora", **shared},
        {"method": "lora", **shared},
        (
            Bar("time of a step, of our LoRA's", ratio("ours.step", "theirs.step")),
            Bar("what the streams alone take, of our LoRA's step", ratio("ours.alone", "theirs.step")),
            Bar("trained numbers, of our LoRA's", ratio("ours.trained", "theirs.trained")),
        ),
        note=STREAMS,
    )


NAMES = (
    "nlora", "loldu", "more", "monarch", "increlora", "triadaptlora", "diffora", "gradnormlorp", "mola", "mhr",
    "meteora", "mtlora",
)  # fmt: skip
EXPERTS = (
    "A linear layer of 1024 x 1024 on 4096 tokens with eight experts of rank 8, of which each token is given two. The "
    "layer's own products, forward and back, are in both sides' time, not in what experts add to it.  MeteoRA trains "
    "the gates.  In fp32 the layer's two products are 0.35 to 0.39 of the loop's time, and those with the experts' 64 "
    "directions are four where the gates train, 0.12 of the two, and six where all do, 0.19: no ratio above 2.3 or 2.4 "
    "is there to be had.  Of what is left a third is the router's gradient for the layer's input, and its sum with the "
    "layer's."
)
STREAMS = (
    "Swin-T's sizes on 4 x 224 x 224 pixels, rank 16, and 4 for each of four tasks, beside Pegbox's own LoRA of as "
    "many numbers.  The last block of a stage has five streams instead of one: the base's products there are made "
    "once, but thin products, norm, activation and residual sums are each stream's own, and so is the product that "
    "downsamples it.  Those alone are timed too, apart from a model: what they add to LoRA's step no code can leave "
    "out.  A LoRA for each task would be four steps."
)
SCORES = (
    "IncreLoRA in the steps before a growth, in which it asks which layers matter: 33 of every 100 as it is set.  The "
    "score is of the gradient of the whole matrix, one product more beside the two of a frozen layer, so 1.5 times "
    "their time at least; nothing of it is kept."
)
FAMILY = (
    "Beside Pegbox's own LoRA of rank 16 on all linears, with the method's own losses and optimizer; see "
    "benchmarks/training.py. EVA and LoRA-GA train as LoRA does. DiffoRA is measured while it searches: afterwards it "
    "is LoRA at some of the sites."
)


def _quantised() -> Pair:
    """LoRA over a base of four bits, beside LoRA over the same in bfloat16."""
    shared = {"library": "pegbox", "method": "lora", "steps": STEPS, "forward": False}
    return Pair(
        "lora-nf4",
        "LoRA over nf4",
        "training",
        {"dtype": NF4, **shared},
        {"dtype": "bf16", **shared},
        (
            Bar("time of a step, of that over bfloat16", ratio("ours.step", "theirs.step"), at_most=2.0),
            Bar("what the blocks' linears keep, of bfloat16", ratio("ours.linears", "theirs.linears"), at_most=0.3),
            Bar("peak memory, of that over bfloat16", MEMORY),
        ),
        note=QUANTISED,
    )


QUANTISED = (
    "The linears of the blocks in bitsandbytes' nf4 with double quantisation, embedding and head in bfloat16. They are "
    "decoded in the forward and again in the backward pass, never kept."
)
S2FT = (
    "S2FT beside Pegbox's own LoRA of rank 16 on all linears, both through the same loss. Where a processor multiplies "
    "bfloat16 slowly, LoRA's kernel widens the products of every linear, S2FT's those of mlp.down: the others are "
    "the base's own."
)
LISA = (
    "LISA beside Pegbox's own full tuning, in float32 as both train the base's tensors. Embedding, last norm and head "
    "always train, so autograd runs through every block; the ten that rest make no weight gradients and no updates. Of "
    "the matrix products of a full step that leaves 0.79, as the head's three are a quarter of them here; the rest of "
    "the difference is AdamW's update of what rests, which is not made either."
)
BITFIT = (
    "PEFT's nearest to BitFit is BEFT, which adds a trained vector to the output of each linear: the same function "
    "and the same number of parameters. `LoraConfig(bias='all')` trains biases only beside LoRA's factors, LN tuning "
    "trains norms instead. The Llama has biases in attention and MLP here."
)
DENOISING = (
    "A text-conditioned U-Net of three sizes on 8 latents of 4 x 32 x 32. SC-Tuner edits every skip with rho = 1; "
    "Pegbox's own LoRA has rank 64 on all projections of attention, as in the comparison of SCEdit's paper. "
    "Nothing of the U-Net's encoder is kept for the backward pass of the former."
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


def _denoising(dtype: str) -> Pair:
    """SC-Tuner beside our LoRA."""
    shared = {"dtype": dtype, "steps": 1}
    return Pair(
        f"scedit-{dtype}",
        f"SC-Tuner on a U-Net, {dtype}",
        "denoising",
        {"method": "scedit", **shared},
        {"method": "lora", **shared},
        (
            Bar("peak memory above the model, of our LoRA's", ABOVE_MODEL, at_most=1.0),
            Bar("peak memory, of our LoRA's", MEMORY),
            Bar("time of a step, of our LoRA's", ratio("ours.step", "theirs.step")),
            Bar("trained parameters, of our LoRA's", ratio("ours.trained", "theirs.trained")),
        ),
        same="first_loss",
        note=DENOISING,
    )


PRETRAINING = (
    "nano-llama from random weights (hidden 384, 5 blocks, 6 heads, 2 KV heads, MLP 768, vocabulary 4096, tied), steps "
    "of 16 x 512 tokens by the whole engine of `pegbox pretrain`, Muon, compiled as its recipe has it. The share is 6 "
    "FLOPs a parameter and token over what the same cores make of bfloat16 matrix products alone (2048 x 768 x 768), "
    "measured before and after; attention's products are not counted. What keeps it below: those take time, Muon's "
    "do, and norms, rotations and the gate of the MLP move memory while the matrix units wait."
)


def _pretraining() -> Pair:
    """Beside itself not compiled: there is nothing to compare with but what the machine multiplies."""
    share = "share of the matrix rate, by 6 N a token"
    return Pair(
        "pretrain",
        "Training from scratch, 8M parameters, bf16",
        "pretraining",
        {"compile": True},
        {"compile": False},
        (
            Bar(share, value("ours.share"), at_least=0.35),
            Bar(f"{share}, not compiled", value("theirs.share")),
            Bar("tokens a second", value("ours.tokens_per_second")),
            Bar("matrix rate, GFLOP/s", value("ours.gflops")),
        ),
        rounds=3,
        note=PRETRAINING,
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
    training = (*_loras(), *_others(), *_selections(), *_family(), _quantised(), _chat(), *map(_denoising, DTYPES))
    return {pair.name: pair for pair in (*training, *map(_decoding, DTYPES), _pretraining(), _starting())}
