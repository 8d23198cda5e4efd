"""Gradient checkpointing over a frozen embedding.

The reentrant kind recomputes a block only if an input of the block needs a gradient, and the output of a frozen
embedding does not.  transformers makes it need one for either kind, as long as the model lives; here it does for the
reentrant kind alone and while training, so that the other runs what lies below the lowest graft without autograd.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pegbox.core.errors import ModelError


def drop_own_hooks(model: nn.Module) -> None:
    """Take off the hooks that transformers put on the embeddings when it turned checkpointing on."""
    if isinstance(model, PreTrainedModel):
        model.disable_input_require_grads()


def require_input_grads(model: nn.Module) -> RemovableHandle:
    """Make the outputs of the input embeddings need a gradient until the handle is removed.

    Raises:
        ModelError: the model does not say which its input embeddings are.
    """
    getter = getattr(model, "get_input_embeddings", None)  # custom modules need not have it
    embeddings = getter() if getter is not None else None
    if embeddings is None:
        raise ModelError(
            f"{type(model).__name__} has no input embeddings for reentrant checkpointing; "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return embeddings.register_forward_hook(_need_grad)


def is_reentrant(args: Any) -> bool:
    """Whether training arguments ask for reentrant checkpointing."""
    return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def _need_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and first.is_floating_point():
        first.requires_grad_(True)
