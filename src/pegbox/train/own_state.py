"""`tuned.state_dict()` cut down to what the adapters learned, for trainers that save whatever a state dict holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from pegbox.core import Tuned

BASE = "model."  # prefix of the base's keys in a tuned model's state dict


def only_adapters(tuned: Tuned) -> None:
    """From now on, saving the state dict leaves the frozen base out, and loading one does not miss it."""
    tuned.register_state_dict_post_hook(_drop_base)
    tuned.register_load_state_dict_post_hook(_expect_no_base)


def _frozen(tuned: nn.Module, key: str) -> bool:
    assert isinstance(tuned, Tuned)
    trained = {name for adapter in tuned.active for name in tuned.adapter(adapter).selected}
    return key.startswith(BASE) and key.removeprefix(BASE) not in trained


def _drop_base(tuned: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and _frozen(tuned, k.removeprefix(prefix))]:
        del state[key]


def _expect_no_base(tuned: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not _frozen(tuned, key)]
