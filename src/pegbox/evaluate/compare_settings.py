"""The settings of a comparison: those of a run that all methods share, and what is done with each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pegbox import methods
from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.core.settings import setting
from pegbox.train.settings import ALIASES, RunSettings, run_settings

if TYPE_CHECKING:
    from pegbox.core import Method

# settings of a run that a comparison decides itself, or that have no meaning in one
NOT_HERE = (
    "method", "method_settings", "learning_rate", "streaming", "resume", "best", "patience", "eval_steps", "save_steps",
    "keep", "logging_steps", "report_to", "dry_run",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """What `pegbox compare` takes as `key=value`; the settings of a run that it shares are those of `pegbox train`."""

    methods: str | tuple[str, ...] = setting(
        ("lora", "miss", "bitfit", "full"), "names from `pegbox methods`, or LABEL=NAME"
    )
    trials: int = setting(4, "learning rates tried for each method", at_least=1)
    trial_steps: int | None = setting(None, "optimizer steps of a trial; those of a run if not given", at_least=1)
    seeds: int = setting(3, "runs with the best rate, for each method", at_least=1)
    rates: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "middle of a method's grid: rates.lora=1e-3"}
    )
    own: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "settings of the methods, written as lora.rank=16"}
    )
    test: str | None = setting(None, "examples to judge on: a file, a folder, or a hub id")
    test_share: float = setting(0.2, "share of the data to judge on where `test` is not given", above=0, below=1)
    valid_share: float = setting(
        0.15, "share of the data to choose rates on where `valid` is not given", above=0, below=1
    )
    overwrite: bool = setting(False, "forget what an earlier comparison left in output")

    @property
    def names(self) -> tuple[str, ...]:
        """What the methods are called here: as they are given, or by their labels."""
        return tuple(label for label, _ in self.listed)

    @property
    def listed(self) -> list[tuple[str, str]]:
        """(label, name) of each method; a method may be there twice, under labels, with other settings."""
        given = self.methods.split(",") if isinstance(self.methods, str) else self.methods
        parts = [word.strip().partition("=") for word in given if word.strip()]
        return [(label.strip(), (name or label).strip()) for label, _, name in parts]


def compare_settings(values: Mapping[str, Any]) -> CompareSettings:
    """Settings from plain values; `NAME.KEY` is a setting of the method NAME, `rates.NAME` the middle of its grid.

    Raises:
        SettingsError: an unknown key, method or method's setting, or a wrong value.
    """
    known = {f.name for f in fields(CompareSettings)}
    plain: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {k: dict(v) for k, v in (values.get("own") or {}).items()}
    rates: dict[str, Any] = dict(values.get("rates") or {})
    for key, value in values.items():
        group, dot, rest = key.partition(".")
        if group == "rates" and dot:
            rates[rest] = value
        elif dot and group not in known and group != "method":
            own.setdefault(group, {})[rest] = value
        elif key not in ("own", "rates"):
            plain[key] = value
    _check_known_here(plain)
    made = run_settings(plain | {"own": own, "rates": rates}, cls=CompareSettings)
    assert isinstance(made, CompareSettings)
    _check_named(made)
    built(made)
    return made


def _check_known_here(plain: Mapping[str, Any]) -> None:
    for key in plain:
        name = ALIASES.get(key, key)
        if name in NOT_HERE or key.startswith("method."):
            hint = {"method": "methods=lora,full", "learning_rate": "rates.lora=1e-3", "dry_run": "trials=1 seeds=1"}
            better = hint.get(name, "NAME.KEY for a method's own" if "." in key else "")
            raise SettingsError(f"compare takes no {key!r}{f'; {better} is what it takes' if better else ''}")


def _check_named(made: CompareSettings) -> None:
    if len(set(made.names)) < len(made.names) or not made.names:
        raise SettingsError(f"compare.methods must be different names, got {', '.join(made.names) or 'none'}")
    for group, names in (("", made.own), ("rates.", made.rates)):
        for name in names:
            if name not in made.names:
                raise SettingsError(
                    f"{group}{name} is set, but {name!r} is not compared{did_you_mean(name, made.names)}"
                )
    for name, rate in made.rates.items():
        if not rate > 0:
            raise SettingsError(f"rates.{name} must be above 0, got {rate}")


def built(settings: CompareSettings) -> dict[str, Method]:
    """The methods with their settings, by what they are called here."""
    return {label: methods.make(name, settings.own.get(label)) for label, name in settings.listed}
