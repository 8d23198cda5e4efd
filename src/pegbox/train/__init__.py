"""Training: a `transformers.Trainer` for tuned models, a callback for any other trainer, and whole runs from settings.

Names are imported when first used; torch and transformers load only then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Callback": "pegbox.train.callback",
    "RunResult": "pegbox.train.run",
    "RunSettings": "pegbox.train.settings",
    "Trainer": "pegbox.train.trainer",
    "run_settings": "pegbox.train.settings",
    "train": "pegbox.train.run",
}

__all__ = ["Callback", "RunResult", "RunSettings", "Trainer", "run_settings", "train"]

if TYPE_CHECKING:
    from pegbox.train.callback import Callback
    from pegbox.train.run import RunResult, train
    from pegbox.train.settings import RunSettings, run_settings
    from pegbox.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pegbox.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
