"""For which methods a check is: each function gives the trait that rules a method out, or None."""

from __future__ import annotations

import dataclasses
import importlib.util

from pegbox.checks.models import Family
from pegbox.core.method import Method


def merges(method: Method, family: Family) -> str | None:
    return None if method.traits.merge == "exact" else f"traits.merge is {method.traits.merge!r}"


def cannot_merge(method: Method, family: Family) -> str | None:
    return None if method.traits.merge == "no" else f"traits.merge is {method.traits.merge!r}"


def keeps_base(method: Method, family: Family) -> str | None:
    return None if method.traits.keeps_base else "traits.keeps_base is False"


def moves_base(method: Method, family: Family) -> str | None:
    return "traits.keeps_base is True" if method.traits.keeps_base else None


def per_row(method: Method, family: Family) -> str | None:
    return None if method.traits.per_row else "traits.per_row is False"


def not_per_row(method: Method, family: Family) -> str | None:
    return "traits.per_row is True" if method.traits.per_row else None


def packs(method: Method, family: Family) -> str | None:
    return None if method.traits.packs else "traits.packs is False"


def packs_not(method: Method, family: Family) -> str | None:
    return "traits.packs is True" if method.traits.packs else None


def maps_weights(method: Method, family: Family) -> str | None:
    return None if "weight" in method.traits.seams else f"traits.seams are {', '.join(method.traits.seams)}, not weight"


def adds_outputs(method: Method, family: Family) -> str | None:
    """Whether one site's outputs of several adapters can be summed."""
    if {"weight", "output", "skips"} & set(method.traits.seams):
        return None
    return f"traits.seams are {', '.join(method.traits.seams)}, which have no sum"


def has_no_sum(method: Method, family: Family) -> str | None:
    if not method.traits.keeps_base:
        return "traits.keeps_base is False"
    return None if adds_outputs(method, family) else "traits.seams say that adapters have a sum"


def to_lora(method: Method, family: Family) -> str | None:
    return None if method.traits.to_lora else "traits.to_lora is False"


def has_dropout(method: Method, family: Family) -> str | None:
    has = "dropout" in {f.name for f in dataclasses.fields(method)}
    return None if has else "the method has no setting 'dropout'"


def needs_something(method: Method, family: Family) -> str | None:
    return None if method.traits.needs else "traits.needs is empty"


def lacks_a_need(method: Method, family: Family) -> str | None:
    if absent := not_installed(family):
        return absent
    return None if set(method.traits.needs) - family.has else f"{family.name} has all of traits.needs"


def has_its_needs(method: Method, family: Family) -> str | None:
    if absent := not_installed(family):
        return absent
    if family.quantised and not method.traits.keeps_base:
        return f"traits.keeps_base is False, and {family.name} keeps its matrices as {family.quantised}"
    missing = sorted(set(method.traits.needs) - family.has)
    return f"traits.needs {missing[0]!r}, which {family.name} lacks" if missing else None


def not_installed(family: Family) -> str | None:
    """What the family's models need and this machine lacks."""
    if family.package is None or importlib.util.find_spec(family.package[0]):
        return None
    name, extra = family.package
    return f"{name} is not installed: pip install 'pegbox[{extra}]'"


def generates(method: Method, family: Family) -> str | None:
    return None if "generation" in family.has else f"{family.name} does not generate"


def in_one_stack(method: Method, family: Family) -> str | None:
    if "generation" not in family.has:
        return f"{family.name} does not generate"
    return f"{family.name} does not generate in one stack" if "decoder_input_ids" in family.batch(0) else None


def recomputes(method: Method, family: Family) -> str | None:
    return None if "checkpointing" in family.has else f"{family.name} has no gradient checkpointing"


def named_in_peft(method: Method, family: Family) -> str | None:
    if method.traits.peft is None:
        return "traits.peft is None"
    return None if importlib.util.find_spec("peft") else "peft is not installed: pip install 'pegbox[peft]'"


def read_from_peft(method: Method, family: Family) -> str | None:
    layout = method.traits.peft
    if layout is not None and not layout.claims:
        return "traits.peft: HF PEFT's own files are read as those of another method"
    return named_in_peft(method, family)
