"""A batch taken apart: what goes into the model, and what only the objective reads."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pegbox.core.errors import DataError, did_you_mean
from pegbox.core.headless import tuned_in, unwrap
from pegbox.objectives.objective import Batch

FOR_ADAPTERS = ("task_ids",)  # what a batch says to all methods of a comparison, and some ask for
READ_HERE = frozenset(
    {
        "labels",
        "token_weights",
        "assistant_masks",
        "completion_mask",
        "segments",
        "reference_log_probs",
        "margin",
        "desirable",
        "mismatched_input_ids",
        "mismatched_attention_mask",
        "mismatched_labels",
        "mismatched_reference_log_probs",
    }
)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The model's arguments: the batch without what objectives read, or adapters could and do not, and no cache where
    the model would keep one."""
    inputs = {key: value for key, value in batch.items() if key not in READ_HERE}
    asked = inspect.signature(type(unwrap(model)).forward).parameters
    if "use_cache" in asked:
        inputs["use_cache"] = False
    if said := [word for word in FOR_ADAPTERS if word in inputs and word not in asked]:
        tuned = tuned_in(model)
        heard = {} if tuned is None else tuned.aside(inputs)
        for word in set(said) - set(heard):
            del inputs[word]
    return inputs


def field(batch: Batch, key: str, purpose: str) -> Tensor:
    """One tensor of a batch.

    Raises:
        DataError: the batch lacks it.
    """
    value = batch.get(key)
    if value is None:
        raise DataError(f"{purpose} needs {key!r} in the batch{did_you_mean(key, batch)}")
    return value
