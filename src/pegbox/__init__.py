"""Pegbox: every published way to fine-tune a model, behind one registry.

    tuned = pegbox.tune(model, "lora", rank=16)

Names are imported when first used, so that `import pegbox` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "tune": "pegbox.api",
    "load": "pegbox.api",
    "method": "pegbox.api",
    "Tuned": "pegbox.core",
    "Method": "pegbox.core",
    "Stack": "pegbox.core",
    "Sum": "pegbox.core",
    "Trainer": "pegbox.train",
    "Callback": "pegbox.train",
    "PegboxError": "pegbox.core.errors",
}

__all__ = [
    "Callback",
    "Method",
    "PegboxError",
    "Stack",
    "Sum",
    "Trainer",
    "Tuned",
    "__version__",
    "load",
    "method",
    "tune",
    "zoo",
]

if TYPE_CHECKING:
    from pegbox import zoo
    from pegbox.api import load, method, tune
    from pegbox.core import Method, Stack, Sum, Tuned
    from pegbox.core.errors import PegboxError
    from pegbox.train import Callback, Trainer


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module("pegbox.zoo")
    if name not in _WHERE:
        raise AttributeError(f"module 'pegbox' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
