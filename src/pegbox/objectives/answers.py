"""How likely a model finds the answers of a batch, chunk by chunk: all logits never exist at once.

    log p(y | x) = sum_t log p(y_t | x, y_<t)        over the labelled tokens of an answer

A batch holds A answers in one of two forms:

    padded    `input_ids, attention_mask, labels` (A, T): an answer a row
    packed    `input_ids, position_ids, labels, segments` (B, T): several a row, `segments` the number of each token's
              answer, 0 to A-1, and -1 in padding

Of P pairs A = 2P: answers 0 to P-1 are the chosen ones, P to 2P-1 the rejected, in that order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pegbox.core.errors import DataError, MethodError, ModelError
from pegbox.core.headless import WRAPPED_AS, evaluating, through_head
from pegbox.core.tuned import Tuned
from pegbox.objectives.batch import model_inputs
from pegbox.objectives.causal_lm import IGNORED, targets
from pegbox.objectives.objective import Batch


@dataclass(frozen=True)
class Answers:
    """Of each answer: the sum of its tokens' log-probabilities (A,) and how many they are (A,)."""

    sums: Tensor
    tokens: Tensor

    @property
    def means(self) -> Tensor:
        """Log-probability a token (A,)."""
        return self.sums / self.tokens.clamp(min=1)


def score(model: nn.Module, batch: Batch) -> tuple[Answers, Any]:
    """All answers of a batch, in one forward; and what the model returned, whose logits mean nothing."""
    labels, _ = targets(batch)
    values, output = token_log_probs(model, batch, labels)
    return Answers(by_answer(values, batch), by_answer(labels != IGNORED, batch)), output


def token_log_probs(model: nn.Module, batch: Batch, labels: Tensor) -> tuple[Tensor, Any]:
    """log p of the label of each position (B, T), 0 where it has none; differentiable."""
    return through_head(
        model, model_inputs(model, batch), labels.shape[1], lambda head, hidden: head.log_probs(hidden, labels)
    )


def by_answer(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the positions of each answer: (B, T) -> (A,)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else torch.long)
    segments = batch.get("segments")
    if segments is None:
        return values.sum(1)
    inside = segments >= 0
    count = int(segments.max()) + 1
    return values.new_zeros(count).index_add(0, segments[inside], values[inside])


def count_answers(batch: Batch) -> Tensor:
    """A."""
    segments = batch.get("segments")
    labels = batch["input_ids"]
    return torch.tensor(float(len(labels)), device=labels.device) if segments is None else segments.max() + 1.0


def count_pairs(batch: Batch, **_: Any) -> Tensor:
    """P, what a mean over pairs divides by.

    Raises:
        DataError: an odd number of answers.
    """
    answers = count_answers(batch)
    if int(answers) % 2:
        raise DataError(f"a batch of pairs holds {int(answers)} answers, expected the chosen and as many rejected")
    return answers / 2.0


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """(2P,) -> of the chosen (P,), of the rejected (P,)."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


# -- the reference -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_log_probs(
    model: nn.Module, batch: Batch, reference: nn.Module | None, who: str, *, key: str = "reference_log_probs"
) -> Tensor:
    """log p of each answer under the reference (A,), which never trains and drops nothing out.

    Args:
        batch: may hold them already, as `key`.
        reference: a model of its own; the tuned model with its adapter off if None.
        who: the objective, for an error.

    Raises:
        MethodError: the adapter cannot be switched off, since its method trains the base.
        ModelError: there is no adapter to switch off.
    """
    known = batch.get(key)
    if known is not None:
        return known
    if reference is not None:
        with evaluating(reference):
            return score(reference, batch)[0].sums
    with _disabled(model, who), evaluating(model):
        return score(model, batch)[0].sums


WAYS_OUT = (
    "set objective.precompute=true, which asks the base before it is trained, or give a copy of the base as "
    "objective_options={'reference': model}"
)


@contextlib.contextmanager
def _disabled(model: nn.Module, who: str) -> Iterator[None]:
    tuned = tuned_of(model)
    if tuned is None:
        raise ModelError(f"{who} compares with a reference, and this {type(model).__name__} has no adapter; {WAYS_OUT}")
    moved = [name for name in tuned.active if not tuned.adapter(name).method.traits.keeps_base]
    if moved:
        method = tuned.adapter(moved[0]).method.name()
        raise MethodError(
            f"{who} compares with the model before training, and {method} trains the base's own tensors, so that it "
            f"cannot be switched off: {WAYS_OUT}"
        )
    with tuned.disabled():
        yield


def tuned_of(model: nn.Module) -> Tuned | None:
    """The tuned model inside DDP, FSDP1 and torch.compile wrappers, if it is one."""
    while not isinstance(model, Tuned):
        wrapped = next((model._modules[name] for name in WRAPPED_AS if name in model._modules), None)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif wrapped is not None:
            model = wrapped
        else:
            return None
    return model
