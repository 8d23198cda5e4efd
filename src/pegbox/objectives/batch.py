"""A batch taken apart: what goes into the model, and what only the objective reads."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pegbox.core.errors import DataError, did_you_mean
from pegbox.core.headless import unwrap
from pegbox.objectives.objective import Batch

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
    """The model's arguments: the batch without what objectives read, and no cache where the model would keep one."""
    inputs = {key: value for key, value in batch.items() if key not in READ_HERE}
    if "use_cache" in inspect.signature(type(unwrap(model)).forward).parameters:
        inputs["use_cache"] = False
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
