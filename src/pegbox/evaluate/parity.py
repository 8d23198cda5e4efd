"""Whether two models are the same function: one tuned, one merged, one read back from disk, run on the same probes.

    relative difference = max |z' - z| / max |z|        z, z': outputs of the two models, over all probes

    KL = sum_c p_c (log p_c - log p'_c), in nats, per position        top-1: share of positions with one arg max

What decides is the relative difference, that of every tuned module by itself (see site_parity) and, for a reloaded
model, that every tensor has the same bits; KL and top-1 are there for the reader.  A model kept in half precision is
run in float32, its weights widened exactly for the time of the probes: in its own arithmetic two right models differ
by 2 to 5 % of the largest logit, which would hide most mistakes.  What is left is that a merged weight is rounded once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox.core import storage
from pegbox.core.errors import CannotDisable, CannotMerge, ModelError, ParityError
from pegbox.core.fingerprint import BaseDrift
from pegbox.core.storage import Drifts
from pegbox.core.tuned import Tuned
from pegbox.evaluate import site_parity
from pegbox.evaluate.in_float32 import in_float32
from pegbox.evaluate.probes import Probe, builtin
from pegbox.evaluate.report import Difference, Moved, Pair, ParityReport, number
from pegbox.evaluate.saved import reload, save, unequal_tensors, weight_dtypes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unit roundoffs are 6e-8, 5e-4 and 2e-3.  Float32 sums of different order were seen to differ by up to 1e-6 of the
# largest logit on small models; a wrong scale, sign or layer by 1e-2 and more.  Rounding the merged weights once to
# half precision was seen to cost up to 3 units (tests/evaluate/test_parity.py).
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


Details = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Output:
    """What a model said to one probe.

    Attributes:
        values: (positions, classes), or (1, numbers) where they are no logits.
        logits: whether a softmax over the last axis means something.
    """

    values: Tensor
    logits: bool


def compare(
    reference_fn: Callable[[Probe], Any],
    other_fn: Callable[[Probe], Any],
    probes: Sequence[Probe],
    tolerance: float,
    *,
    names: tuple[str, str] = ("reference", "other"),
) -> ParityReport:
    """Two functions of a probe on all probes; `require()` the report to raise on a difference.

    Args:
        reference_fn, other_fn: from a probe to logits (..., classes), or to a model's output.
        tolerance: of the largest difference relative to the largest output.
    """
    said = [[output_of(fn(probe), probe) for probe in probes] for fn in (reference_fn, other_fn)]
    dtype = str(said[0][0].values.dtype).removeprefix("torch.")
    return ParityReport((pair(names, said[0], said[1], probes, tolerance),), dtype)


def gate(
    tuned: Tuned,
    probes: Sequence[Probe] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    *,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    requantise: bool = False,
) -> ParityReport:
    """Prove a merge: the tuned model, merged, and merged-saved-reloaded agree on the probes, pair by pair.

    The tuned model is unmerged again on return.

    Args:
        probes: what to run; the built-in ones for the model and tokenizer if not given.
        tolerance: of the relative difference; by default that of the coarsest dtype among the weights (TOLERANCE).
        folder: where the merged model is saved and stays; a temporary folder if not given.
        dtype: to save in; the model's own if not given.
        requantise: keep a quantised base quantised, which moves the merged matrices: how far is told, and what the
            merged model says is shown beside the tuned one's, not held to it.

    Raises:
        ParityError: a pair is past tolerance, or a saved tensor came back with other bits; its `report` has them all.
        CannotMerge: the adapter in use has no merged form, or what is to stay quantised is not.
    """
    if requantise:
        _check_requantised(tuned)
    probes = list(probes) if probes is not None else builtin(tuned.model, tokenizer)
    with _evaluating(tuned), _folder(folder) as target:
        outputs = {"base": run_bare(tuned, probes), "adapter": run(tuned, probes)}
        calls = site_parity.record(tuned, probes)
        model = tuned.merge(requantise=requantise)
        try:
            outputs["merged"] = run(model, probes)
            sites = site_parity.differences(model, calls)
            # what no adapter has touched may still be quantised
            with storage.savable(model) if requantise else storage.plain(model):
                save(model, target, dtype)
                again = reload(model, target, dtype)
                unequal = unequal_tensors(model, again)
            storage.still(again)
            outputs["reloaded"] = run(again, probes)
        finally:
            tuned.unmerge()
        dtypes = weight_dtypes(tuned.model) | ({dtype} if dtype else set())
    more: Details = {("adapter", "merged"): {"sites": sites}, ("merged", "reloaded"): {"tensors": unequal}}
    shown = (("adapter", "merged"), ("adapter", "reloaded")) if requantise else ()
    moved = (*of_base(tuned), *_of_merging(tuned))
    return judge(outputs, probes, dtypes, tolerance, more, _unreached(calls), shown=shown, moved=moved)


def of_base(tuned: Tuned) -> tuple[Moved, ...]:
    """How far the base is from what the adapters in use were trained on, where it is kept otherwise here."""
    found = {name: tuned.adapter(name).base_drift for name in tuned.active}
    return tuple(_of_one(name, drift) for name, drift in found.items() if drift is not None)


def _of_one(name: str, drift: BaseDrift) -> Moved:
    rough = "" if drift.proven else ", as a few values of each tell,"
    return Moved(
        f"The adapter {name!r} was trained on a base kept as {drift.then}; here it is kept as {drift.now}, and "
        f"{len(drift.drifts.of)} of its matrices are off by{rough}",
        drift.drifts,
    )


def _of_merging(tuned: Tuned) -> tuple[Moved, ...]:
    """How far encoding the merged matrices anew has moved them."""
    if not tuned.merge_drift:
        return ()
    drifts = tuned.merge_drift
    of_change = {path: drift.of_change for path, drift in drifts.items()}
    whole = Drifts({path: drift.of_matrix for path, drift in drifts.items()})
    moved = [Moved(f"Keeping the {len(drifts)} merged matrices quantised has moved them by", whole)]
    if all(map(math.isfinite, of_change.values())):
        moved.append(Moved("Relative to what the adapter had changed of them, that is", Drifts(of_change)))
    return tuple(moved)


def _check_requantised(tuned: Tuned) -> None:
    if not storage.quantised_parameters(tuned.model):
        raise CannotMerge("requantise keeps a quantised base quantised, and this base is plain numbers; leave it out")
    if getattr(tuned.model, "hf_quantizer", None) is None:
        raise CannotMerge(
            "requantise writes files that transformers reads, and it was not transformers that quantised all of this "
            "base, so its configuration does not say how; leave requantise out, which writes plain numbers"
        )


def judge(
    outputs: Mapping[str, list[Output] | None],
    probes: Sequence[Probe],
    dtypes: set[torch.dtype],
    tolerance: float | None = None,
    more: Details | None = None,
    notes: Sequence[str] = (),
    *,
    shown: Collection[tuple[str, str]] = (),
    moved: Sequence[Moved] = (),
) -> ParityReport:
    """The report over all pairs of models; those with the base are shown, not judged.

    Args:
        outputs: of each model, by name; None for a base that is gone.
        dtypes: of the weights; the coarsest sets the tolerance if none is given.
        more: `tensors` and `sites` of a pair (see Pair).
        notes: what a reader must know to trust the numbers.
        shown: pairs that are not judged either.
        moved: what is not as it was in training.

    Raises:
        ParityError: with the report as its attribute `report`.
    """
    coarsest = max(dtypes, key=lambda d: TOLERANCE.get(d, 0.0))
    limit = TOLERANCE.get(coarsest, TOLERANCE[torch.float32]) if tolerance is None else tolerance
    said = {name: values for name, values in outputs.items() if values is not None}
    pairs = [
        pair(
            names,
            said[names[0]],
            said[names[1]],
            probes,
            None if names in shown else limit,
            **(more or {}).get(names, {}),
        )
        for names in itertools.combinations([n for n in said if n != "base"], 2)
    ]
    if "base" in said:
        effect = pair(("base", "adapter"), said["base"], said["adapter"], probes, None)
        notes = [*notes, *_blind(effect, limit)]
        pairs.insert(0, effect)
    report = ParityReport(tuple(pairs), str(coarsest).removeprefix("torch."), tuple(notes), tuple(moved))
    try:
        return report.require()
    except ParityError as error:
        error.report = report  # type: ignore[attr-defined]
        raise


def _unreached(calls: Mapping[str, Sequence[Any]]) -> list[str]:
    unseen = [path for path, some in calls.items() if not some]
    if not unseen:
        return []
    return [
        f"{len(unseen)} of {len(calls)} tuned modules were reached by no probe and are not compared: {unseen[0]}, ..."
    ]


def _blind(effect: Pair, limit: float) -> list[str]:
    if effect.relative > limit:
        return []
    return [
        f"The adapter itself changes the outputs by {number(effect.relative)} of the largest, less than the "
        f"tolerance of {number(limit)}: a wrong merge of it could not be told from a right one."
    ]


# -- running -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(model: nn.Module, probes: Sequence[Probe]) -> list[Output]:
    """What a model says to each probe, in float32 arithmetic, on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with in_float32(model):
        return [output_of(model(**probe.on(device)), probe) for probe in probes]


def run_bare(tuned: Tuned, probes: Sequence[Probe]) -> list[Output] | None:
    """What the base says; None where the method has changed it for good."""
    try:
        with tuned.disabled():
            return run(tuned, probes)
    except CannotDisable:
        return None


def output_of(out: Any, probe: Probe) -> Output:
    """The outputs of a model to compare, without those at padding.

    Raises:
        ModelError: there is no floating-point tensor among them.
    """
    logits = out if isinstance(out, Tensor) else out.get("logits") if isinstance(out, Mapping) else None
    if isinstance(logits, Tensor):
        mask = probe.inputs.get("attention_mask")
        if mask is not None and logits.ndim == 3 and logits.shape[:2] == mask.shape:
            logits = logits[mask.to(logits.device).bool()]  # (positions, classes)
        flat = logits.reshape(-1, logits.shape[-1] if logits.ndim else 1)
        return Output(flat.float().cpu(), logits=flat.shape[1] > 1)
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ()
    floats = [v.flatten().float().cpu() for v in parts if isinstance(v, Tensor) and v.is_floating_point()]
    if not floats:
        raise ModelError(f"the model answers probe {probe.name!r} with {type(out).__name__}, which holds no outputs")
    return Output(torch.cat(floats)[None], logits=False)


@contextlib.contextmanager
def _evaluating(tuned: Tuned) -> Iterator[None]:
    training = {m: m.training for m in tuned.modules()}
    tuned.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before


@contextlib.contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


# -- comparing ---------------------------------------------------------------------------------------------------


def pair(
    names: tuple[str, str],
    reference: Sequence[Output],
    other: Sequence[Output],
    probes: Sequence[Probe],
    tolerance: float | None,
    **more: Any,
) -> Pair:
    """Two models' outputs to the same probes."""
    found = tuple(_difference(p.name, a, b) for p, a, b in zip(probes, reference, other, strict=True))
    return Pair(*names, tolerance, found, **more)


def _difference(probe: str, reference: Output, other: Output) -> Difference:
    z, w = reference.values, other.values
    if z.shape != w.shape:
        raise ParityError(f"on probe {probe!r} one model gives outputs {tuple(z.shape)}, the other {tuple(w.shape)}")
    gap = torch.where(z == w, 0.0, (z - w).abs())  # equal infinities differ by nothing
    finite = z[z.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    kl = _kl(z, w) if reference.logits else None
    top1 = (z.argmax(-1) == w.argmax(-1)).float().mean().item() if reference.logits else None
    return Difference(
        probe=probe,
        largest=gap.max().item(),
        scale=scale,
        mean_kl=None if kl is None else kl.mean().item(),
        max_kl=None if kl is None else kl.max().item(),
        top1=top1,
        positions=len(z),
    )


def _kl(z: Tensor, w: Tensor) -> Tensor:
    """KL(softmax z, softmax w) per position: (positions, classes) -> (positions,), summed in float64."""
    log_p, log_q = z.double().log_softmax(-1), w.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0)
