"""Evaluation of an objective: predictions of all batches, then its metrics over the whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from pegbox.objectives.objective import Batch, Objective, Predictions

if TYPE_CHECKING:
    from pegbox.train.trainer import Trainer

Measure = Callable[[Predictions], dict[str, float]]
LOSSES = ("nll", "mse")  # metrics that are the loss itself


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Iterable[Batch], prefix: str) -> EvalLoopOutput:
    """Predictions and metrics of an evaluation set.

    Metrics are `PREFIX_NAME`; `PREFIX_loss` is the objective's loss, a mean over the set, without label smoothing.
    With several processes, rows that fill up the last batch are counted where predictions are one a token.
    """
    model: Any = trainer.model
    model.eval()
    objective, kept = trainer.objective, []
    total = torch.zeros(2, dtype=torch.float64)  # the sum of losses, and what it is a mean over
    for inputs in batches:
        batch = trainer._prepare_inputs(dict(inputs))
        with trainer.accelerator.autocast():
            if isinstance(objective, Objective):
                kept.append(_gathered(trainer, objective.predict(model, batch), _rows(batch)))
            else:
                rows = _rows(batch)
                loss = sum(objective(model, batch, **trainer.objective_options).values())
                total += torch.tensor([float(loss) * rows, rows], dtype=torch.float64)
        trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    trainer.tuned.context.losses.clear()
    predictions = {key: torch.cat([k[key] for k in kept]) for key in kept[0]} if kept else {}
    metrics = _metrics(objective, trainer.metrics, predictions)
    if not predictions:
        total = sum(gather_object([total]), torch.zeros(2, dtype=torch.float64))
        metrics["loss"] = float(total[0] / total[1])
    named = {f"{prefix}_{key}": value for key, value in metrics.items()}
    found: Any = predictions
    return EvalLoopOutput(found, found.get("labels"), named, len(next(iter(predictions.values()), ())))


def _metrics(objective: Any, own: Measure | None, predictions: Predictions) -> dict[str, float]:
    measured: dict[str, float] = {}
    if isinstance(objective, Objective) and predictions:
        measured = objective.measure(predictions)
        if "loss" not in measured:
            measured["loss"] = next(measured[key] for key in LOSSES if key in measured)
    return measured | (own(predictions) if own is not None else {})


def _rows(batch: Batch) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def _gathered(trainer: Trainer, predictions: Predictions, rows: int) -> Predictions:
    """The batch's predictions of all processes, on the CPU."""
    here = {key: value.cpu() for key, value in predictions.items()}
    if trainer.accelerator.num_processes == 1:
        return here
    parts = gather_object([here])
    joined = {key: torch.cat([part[key] for part in parts]) for key in here}
    state = trainer.accelerator.gradient_state
    by_row = all(rows in (len(value), 2 * len(value)) for value in here.values())  # of pairs, two rows an example
    if state.end_of_dataloader and state.remainder > 0 and by_row:
        joined = {key: value[: state.remainder] for key, value in joined.items()}
    return joined
