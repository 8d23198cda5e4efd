"""HF PEFT's own tuners as methods: `peft:NAME`, for every tuner of the PEFT that is installed.

    tuned = pegbox.tune(model, "peft:vera", rank=64)

PEFT makes its layers; they are taken out of the model again, which is left as it was, and each becomes a graft at its
site.  So whatever Pegbox does with a method it does with these, and their files are PEFT's own.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import AdapterError, MissingExtra, SettingsError, did_you_mean

if TYPE_CHECKING:
    from pegbox.core.method import Method
    from pegbox.peft_bridge.method import PeftMethod

PREFIX = "peft:"


def is_bridged(name: str) -> bool:
    """Whether a method's name asks for one of PEFT's own."""
    return name.lower().startswith(PREFIX)


def installed() -> bool:
    return importlib.util.find_spec("peft") is not None


def names() -> list[str]:
    """Every tuner of the installed PEFT that is reached here, as `peft:NAME`."""
    from pegbox.peft_bridge.kinds import REFUSED

    return [f"{PREFIX}{name}" for name in _tuners() if name not in REFUSED]


def get(name: str) -> type[PeftMethod]:
    """The method of a tuner.

    Args:
        name: `peft:NAME`; NAME is a PEFT type in small letters.

    Raises:
        SettingsError: PEFT has no such tuner, with the nearest one, or it cannot be reached, with the reason.
        MissingExtra: PEFT is not installed.
    """
    from pegbox.peft_bridge.kinds import REFUSED

    tuner = name.lower().removeprefix(PREFIX).replace("-", "_")
    known = _tuners()
    if tuner in REFUSED and tuner in known:
        raise SettingsError(f"{PREFIX}{tuner} is not reached from here: {REFUSED[tuner]}")
    if tuner not in known:
        near = did_you_mean(f"{PREFIX}{tuner}", names())
        raise SettingsError(f"the installed HF PEFT has no tuner {tuner!r}{near}")
    return _made(tuner)


def matrix(ours: Mapping[str, type[Method]]) -> list[dict[str, Any]]:
    """Every tuner of the installed PEFT as plain values: what it does here, or why it is not reached.

    Args:
        ours: Pegbox's own methods, to say which of them are a tuner's equation.
    """
    from pegbox.peft_bridge.kinds import REFUSED, facts

    entries = []
    for tuner in sorted(_tuners()):
        known = facts(tuner)
        targets = known.targets if isinstance(known.targets, str) else ", ".join(known.targets)
        kinds = {name: method.traits.peft.kind for name, method in ours.items() if method.traits.peft}
        entries.append(
            {
                "name": f"{PREFIX}{tuner}",
                "refused": REFUSED.get(tuner),
                "targets": targets,
                "identity": known.identity,
                "merge": "exact" if known.merges else "no",
                "per_row": "yes" if known.per_row else "no",
                "needs": list(known.needs),
                "ours": sorted(name for name, kind in kinds.items() if kind.lower() == tuner),
                "xfail": dict(known.xfail),
            }
        )
    return entries


def of_config(config: Mapping[str, Any], named: str | None = None) -> type[PeftMethod] | None:
    """The method that an `adapter_config.json` of PEFT's is of; None if there is none here, or no PEFT.

    Args:
        named: the method that Pegbox noted in the file, if it wrote the file.
    """
    from pegbox.peft_bridge.kinds import FINISHED, REFUSED

    kind = config.get("peft_type")
    if not installed() or not isinstance(kind, str):
        return None
    tuner = kind.lower()
    _check_known(config, kind)
    if named is None:
        tuner = FINISHED.get(tuner, tuner)
    if tuner not in _tuners() or tuner in REFUSED or (named is not None and named != f"{PREFIX}{tuner}"):
        return None
    return _made(tuner)


def _check_known(config: Mapping[str, Any], kind: str) -> None:
    """Raise AdapterError if a file has a setting that the installed PEFT lacks, with a value that says something."""
    import dataclasses

    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)  # type: ignore[call-overload]
    if cls is None:
        return
    known = {f.name for f in dataclasses.fields(cls)}
    strange = sorted(key for key, value in config.items() if value and key not in known)
    if strange:
        raise AdapterError(
            f"the {kind} adapter says {strange[0]}={config[strange[0]]!r}, which HF PEFT {peft.__version__} does not "
            f"know; it was written by PEFT {config.get('peft_version') or 'of another version'}: pip install -U peft"
        )


@functools.cache
def _made(tuner: str) -> type[PeftMethod]:
    from pegbox.peft_bridge.method import method_class

    return method_class(tuner)


def _tuners() -> list[str]:
    """Names of all tuners that the installed PEFT has."""
    if not installed():
        raise MissingExtra("peft", "peft", "a method peft:NAME")
    from peft import PeftType

    return [kind.value.lower() for kind in PeftType]
