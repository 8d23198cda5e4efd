"""Training over a quantised base, which transformers allows only where it knows of adapters on the model."""

from __future__ import annotations

from typing import Any

from pegbox.core import Tuned
from pegbox.core.errors import MethodError

KNOWN_AS = "_hf_peft_config_loaded"  # transformers' word for "trainable adapters are attached"


def allow_quantised(tuned: Tuned) -> None:
    """Tell a trainer that what trains of a quantised model are adapters; of any other model, do nothing.

    Raises:
        MethodError: a method trains the base's own tensors, which are stored in a few bits.
    """
    base: Any = tuned.model
    if not getattr(base, "is_quantized", False):  # transformers sets it on the models it quantises
        return
    own = [name for name in tuned.active if not tuned.adapter(name).method.traits.keeps_base]
    if own or any(p.requires_grad and not p.dtype.is_floating_point for p in base.parameters()):
        method = tuned.adapter(own[0]).method.name() if own else "this method"
        stored = getattr(base, "quantization_method", None)
        how = getattr(stored, "value", stored) or "a quantiser"
        raise MethodError(
            f"{method} trains the base's own tensors, and this base is stored by {how} in a few bits that no gradient "
            "can change; use a method that keeps the base (lora, series, ...), or load the base unquantised"
        )
    setattr(tuned, KNOWN_AS, True)
