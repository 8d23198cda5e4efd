"""Sequence to sequence: a target from a source, by an encoder and a decoder (T5, BART, ...).

    nll = sum_t -log p(y_t | source, y_<t) / number of target tokens        over t whose label is not -100

The decoder reads the labels shifted by one as the model itself shifts them, and the logits of a whole batch are never
made (see `pegbox.core.headless`).  Asked to (`objective.generate=N`), an evaluation also generates, greedily, and
compares the tokens with the target's: equal, and ROUGE-L (Lin, 2004, https://aclanthology.org/W04-1013), the F1 of the
longest common subsequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import ModelError
from pegbox.core.headless import Head, through_head, unwrap
from pegbox.core.settings import setting
from pegbox.objectives import metrics
from pegbox.objectives.answers import tuned_of
from pegbox.objectives.batch import field, model_inputs
from pegbox.objectives.causal_lm import IGNORED, router_loss
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions, Settings


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Settings):
    """What `objective.KEY` sets."""

    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary", at_least=0, below=1)
    generate: int = setting(
        0, "tokens to generate in an evaluation, for exact_match and rouge_l; 0 for none", at_least=0
    )


DEFAULTS = Seq2Seq()


def seq2seq(
    model: nn.Module, batch: Batch, *, settings: Seq2Seq = DEFAULTS, num_items: Tensor | float | None = None
) -> Losses:
    """The loss of the targets' tokens.

    Args:
        model: an encoder-decoder that returns logits (B, T, V), as it is or wrapped
        batch: `input_ids` and `attention_mask` (B, S) of the sources, `labels` (B, T) of the targets, -100 where
            nothing is learned, and whatever else the model takes
        num_items: what the sum of the losses is divided by, see `count`; the batch's own count if None

    Returns:
        `nll`, and `aux` where the model has routers.

    Raises:
        DataError: no `labels`.  ModelError: the model has no decoder that reads them.
    """
    labels = field(batch, "labels", "seq2seq")

    def use(head: Head, hidden: Tensor) -> Tensor:
        return head.cross_entropy(hidden, labels, label_smoothing=settings.label_smoothing, reduction="sum")

    total, output = through_head(model, decoder_inputs(model, batch, labels), labels.shape[1], use)
    own = count(batch).clamp(min=1)
    items = own if num_items is None else num_items
    router = router_loss(model, output)
    return {"nll": total / items} | ({} if router is None else {"aux": router * own / items})


def decoder_inputs(model: nn.Module, batch: Batch, labels: Tensor) -> dict[str, Any]:
    """The model's arguments, with the labels (B, T) shifted to what its decoder reads.

    Raises:
        ModelError: it is no encoder-decoder of transformers.
    """
    inputs = model_inputs(model, batch)
    if "decoder_input_ids" in inputs:
        return inputs
    shift = getattr(unwrap(model), "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        name = type(unwrap(model)).__name__
        raise ModelError(f"seq2seq needs an encoder-decoder as T5 or BART, a {name} is none; use objective=sft")
    return inputs | {"decoder_input_ids": shift(labels=labels)}


def count(batch: Batch, **_: Any) -> Tensor:
    """Labelled tokens: what a mean divides by."""
    return (field(batch, "labels", "seq2seq") != IGNORED).sum()


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, settings: Seq2Seq = DEFAULTS) -> Predictions:
    """Per row (B,): `nll`, the sum of its tokens' losses, and `tokens`, how many they are; where it generates,
    `exact_match` and `rouge_l`."""
    labels = field(batch, "labels", "seq2seq")
    inputs = decoder_inputs(model, batch, labels)
    losses, _ = through_head(model, inputs, labels.shape[1], lambda head, x: head.token_losses(x, labels))  # (B, T)
    found = {"nll": losses.sum(1), "tokens": (labels != IGNORED).sum(1)}
    return found | (_generated(model, batch, labels, settings.generate) if settings.generate else {})


def _generated(model: nn.Module, batch: Batch, labels: Tensor, tokens: int) -> Predictions:
    base: Any = tuned_of(model) or unwrap(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    written = base.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
    pairs = [
        (_words(ours, base.generation_config), _words(theirs, base.generation_config))
        for ours, theirs in zip(written, labels, strict=True)
    ]
    exact = [float(ours == theirs) for ours, theirs in pairs]
    rouge = [rouge_l(ours, theirs) for ours, theirs in pairs]
    return {
        "exact_match": torch.tensor(exact, device=labels.device),
        "rouge_l": torch.tensor(rouge, device=labels.device),
    }


def _words(ids: Tensor, special: Any) -> list[int]:
    """Token ids up to the end of the sequence, less those that frame it; `special` is a generation config."""
    frame = {IGNORED, special.pad_token_id, special.bos_token_id}
    ends = special.eos_token_id if isinstance(special.eos_token_id, list) else [special.eos_token_id]
    kept = [int(i) for i in ids]
    start = int(bool(kept) and kept[0] == special.decoder_start_token_id)
    end = next((at for at, i in enumerate(kept) if at >= start and i in ends), len(kept))
    return [i for i in kept[start:end] if i not in frame]


def rouge_l(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """F1 of the longest common subsequence, 0 to 1; 1 for two empty sequences."""
    if not ours or not theirs:
        return float(not ours and not theirs)
    row = [0] * (len(theirs) + 1)  # row[j]: of what was seen of ours, and the first j of theirs
    for a in ours:
        diagonal = 0
        for j, b in enumerate(theirs, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return 2.0 * row[-1] / (len(ours) + len(theirs))


def measure(predictions: Predictions, *, settings: Seq2Seq = DEFAULTS) -> dict[str, float]:
    """`nll` a token and `perplexity`; `exact_match` and `rouge_l` of rows, where the evaluation generated."""
    nll = metrics.nll(predictions["nll"], predictions["tokens"])
    found = {"nll": nll, "perplexity": metrics.perplexity(nll)}
    return found | {k: float(predictions[k].double().mean()) for k in ("exact_match", "rouge_l") if k in predictions}


OBJECTIVE = Objective("seq2seq", seq2seq, count, predict, measure, best="nll", higher_is_better=False, settings=Seq2Seq)
