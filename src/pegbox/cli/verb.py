"""A verb whose words are settings: what it takes, how its words become a settings object, and its help."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    import typer

HELP = ("--help", "-h")
REST = "more"


@dataclass(frozen=True)
class Verb:
    """What a verb takes.

    Attributes:
        name: of the command.
        settings: the dataclass, as "module:Class"; imported when it is needed.
        builder: the function from plain values to an instance, as "module:function"; `build` if not given.
        needs: settings that must be given; of a tuple inside, one.
        subject: the setting that a bare first word gives; of `adapter` and `model`, the one whose folder it is.
        preset: values that the verb itself gives.
        groups: heading -> names of settings, for the help; a setting of no group comes last.
        hidden: settings that this verb does not offer.
    """

    name: str
    settings: str
    builder: str | None = None
    needs: tuple[str | tuple[str, ...], ...] = ()
    subject: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    def read(self, context: typer.Context) -> Any:
        """The settings of a command line; prints the help and leaves where that is asked for.

        Raises:
            SettingsError: an unknown key, a wrong value, or one that is needed and not given.
        """
        import typer

        if any(word in HELP for word in context.args):
            print(self.help(context.command.help or ""))
            raise typer.Exit
        return self.built(context.args)

    def built(self, words: Sequence[str], *, complete: bool = True) -> Any:
        """The settings that the words after the verb mean.

        Args:
            complete: whether everything that is needed must be there.
        """
        from pegbox.cli.overrides import parse

        subject = self._subject_of if self.subject else None
        given = parse(words, ours=self._name, texts=self._texts(), subject=subject, example=self._example())
        if hidden := [k for k in given if k in self.hidden]:
            raise SettingsError(f"{self.name} takes no {hidden[0]!r}; `pegbox {self.name} --help` lists what it takes")
        made = self._build({**self.preset, **self._ours(given)})
        if complete:
            self._check_needs(made)
        return made

    def _check_needs(self, made: Any) -> None:
        for need in self.needs:
            one_of = (need,) if isinstance(need, str) else need
            if not any(getattr(made, name) for name in one_of):
                wanted = " or ".join(f"{name}=" for name in one_of)
                raise SettingsError(f"{self.name} needs {wanted}; `pegbox {self.name} --help` lists all settings")

    def _build(self, values: dict[str, Any]) -> Any:
        from pegbox.core.settings import build

        if self.builder:
            return _imported(self.builder)(values)
        return build(self._class(), values, what=self.name)

    def _ours(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values under our names, where the verb has the setting."""
        from pegbox.train.settings import with_quantise

        out: dict[str, Any] = {}
        for key, value in with_quantise(given).items():
            name = self._name(key)
            if name in out:
                raise SettingsError(f"{name} is given twice, as {key!r} too")
            out[name] = value
        return out

    def _name(self, key: str) -> str:
        """Our name for a key, where the verb has the setting."""
        from pegbox.train.settings import ALIASES

        known = {f.name for f in dataclasses.fields(self._class())}
        ours = ALIASES.get(key, key)
        return key if key in known or ours not in known else ours

    def _texts(self) -> _Texts:
        """Settings that are text and nothing else; one with settings of its own may be a mapping of them."""
        cls = self._class()
        parts = [part for f in dataclasses.fields(cls) if (part := _part(cls, f.name)) is not None]
        return _Texts(_plain_texts(cls) | {f"{prefix}.{name}" for prefix, part in parts for name in _plain_texts(part)})

    def _subject_of(self, word: str) -> str:
        """The setting that a bare first word gives."""
        if len(self.subject) == 1:
            return self.subject[0]
        from pegbox.evaluate.opened import is_adapter

        return "adapter" if is_adapter(word) else "model"

    def _example(self) -> str:
        """The settings that it needs, as words."""
        names = [need if isinstance(need, str) else need[0] for need in self.needs]
        return " ".join(f"{name}=..." for name in names)

    def _class(self) -> Any:
        return _imported(self.settings)

    # -- help ----------------------------------------------------------------------------------------------------

    def help(self, about: str = "") -> str:
        """The verb's settings with types, defaults and meanings; those of a part under the part's own heading."""
        fields = {f.name: f for f in dataclasses.fields(self._class()) if f.name not in self.hidden}
        parts = {name: part for name in fields if (part := _part(self._class(), name)) is not None}
        grouped = {heading: names.split() for heading, names in self.groups.items()}
        named = {name for names in grouped.values() for name in names}
        for name in named - fields.keys():
            raise SettingsError(f"{self.name}: no setting {name!r}{did_you_mean(name, fields)}")
        grouped[REST if named else "settings"] = [n for n in fields if n not in named and n not in parts]
        subject = f" [{'|'.join(name.upper() for name in self.subject)}]" if self.subject else ""
        lines = [f"pegbox {self.name} [recipe.yaml]{subject} key=value ...", "", about.strip()]
        for heading, names in grouped.items():
            if names:
                lines += ["", f"{heading}:", *(line for n in names for line in self._lines(n, fields[n]))]
        told: list[type] = []
        for name, (prefix, cls) in parts.items():
            own = (line for f in dataclasses.fields(cls) for line in self._lines(f"{prefix}.{f.name}", f, cls))
            lines += ["", f"{name}: {fields[name].metadata['help']}", *(own if cls not in told else ())]
            told.append(cls)
        return "\n".join(lines)

    def _lines(self, name: str, spec: dataclasses.Field[Any], cls: type | None = None) -> list[str]:
        import shutil
        import textwrap

        width = min(shutil.get_terminal_size((120, 24)).columns, 140)
        default = self.preset.get(name, spec.default)
        shown = f"  {name}{_default(default)}"
        meaning = spec.metadata.get("help", "") + _choices(cls or self._class(), spec.name)
        wrapped = textwrap.wrap(meaning, max(width - 42, 30)) or [""]
        head = [f"{shown:<40}  {wrapped[0]}"] if len(shown) <= 40 else [shown, f"{'':<42}{wrapped[0]}"]
        return head + [f"{'':<42}{line}" for line in wrapped[1:]]


@dataclass(frozen=True)
class _Texts:
    """Names of settings, those of a part's part with NAME in the place of its name."""

    names: set[str]

    def __contains__(self, key: object) -> bool:
        first, *middle, last = str(key).split(".") if "." in str(key) else (str(key), "")
        return (f"{first}.NAME.{last}" if middle else key) in self.names


def _plain_texts(cls: type) -> set[str]:
    import typing

    hints = typing.get_type_hints(cls)
    plain = {name for name, hint in hints.items() if hint in (str, str | None)}
    return {name for name in plain if f"{name}_settings" not in hints}


def _part(cls: type, name: str) -> tuple[str, type] | None:
    """A setting that has settings itself: what stands before their names, and their dataclass."""
    import typing

    hint = typing.get_type_hints(cls)[name]
    if dataclasses.is_dataclass(hint):
        return name, typing.cast(type, hint)
    inner = typing.get_args(hint)[-1:]
    return (f"{name}.NAME", typing.cast(type, inner[0])) if inner and dataclasses.is_dataclass(inner[0]) else None


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or value is None or value == "" or value == ():
        return "="
    return f"={str(value).lower() if isinstance(value, bool) else value}"


def _choices(cls: type, name: str) -> str:
    """What a setting may be, where that is a short list."""
    import typing

    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is typing.Literal:
        return f" ({', '.join(map(str, typing.get_args(hint)))})"
    return " (true, false)" if hint is bool else ""


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
