"""A tuner of HF PEFT's as a method.

The settings are those of PEFT's configuration class; the equation is PEFT's, since its own layers run.  A graft around
a site wraps the layer that PEFT would have put there.  Files are PEFT's, key for key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pegbox.core import Anatomy, Graft, Method, Site, Traits, setting
from pegbox.core.adapter import Adapter, check_fit, path_of
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.site import ModuleSite
from pegbox.peft_bridge.harvest import Bank, file_names, harvest, put, quiet, refusal
from pegbox.peft_bridge.kinds import WITHHELD, Facts, facts
from pegbox.peft_bridge.layer_graft import LayerGraft
from pegbox.peft_bridge.settings import OURS, aliases, as_setting, as_theirs, from_config, offered, usual

State = dict[str, Tensor]
INSIDE = ".base_layer."  # PEFT adds the base's own embeddings to some files


class PeftMethod(Method):
    """Base of every `peft:NAME` whose tuner puts layers around modules."""

    tuner: ClassVar[str]
    config: ClassVar[type]
    facts: ClassVar[Facts]

    @classmethod
    def name(cls) -> str:
        return f"peft:{cls.tuner}"

    @classmethod
    def about(cls) -> str:
        return (
            f"{cls.tuner}, as HF PEFT has it: {cls.config.__name__}\n\n"
            "PEFT's own layers run, one around each site; the settings are those of its configuration class."
        )

    # -- what goes where -------------------------------------------------------------------------------------------

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        paths = Method.sites(self._present(anatomy), model, anatomy)
        if "bias" in self.facts.needs:
            paths = self._biased(paths, model)
        return _with_tied(paths, model, anatomy) if self.facts.tied else paths

    def _biased(self, paths: list[str], model: nn.Module) -> list[str]:
        found = [path for path in paths if model.get_submodule(path)._parameters.get("bias") is not None]
        if not found:
            raise TargetError(f"{self.name()} changes biases, and {self.targets!r} names no module that has one")
        return found

    def _present(self, anatomy: Anatomy) -> PeftMethod:
        """With those of the usual targets that this model has."""
        if self.targets != self.facts.targets or isinstance(self.targets, str):
            return self
        present = tuple(role for role in self.targets if role in anatomy.roles())
        return dataclasses.replace(self, targets=present) if present else self

    def shared(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        bank = harvest(model, self.peft_config(model, anatomy), self.name())
        paths = self.sites(model, anatomy)
        if not bank.layers[0]:  # OSF passes over what is no nn.Linear, and says nothing
            kind = type(model.get_submodule(paths[0])).__name__
            raise refusal(TypeError(f"it puts no layer around {paths[0]}, a {kind}, or another target"), self.name())
        if beyond := sorted(bank.layers[0].keys() - set(paths)):
            raise TargetError(
                f"{self.name()}: HF PEFT changes {beyond[0]} too, which targets do not name; name it there"
            )
        return bank

    def graft(self, site: Site, shared: nn.Module | None) -> Graft | None:
        assert isinstance(shared, Bank)
        assert isinstance(site, ModuleSite)
        layer = shared.take(site.path)
        return None if layer is None else LayerGraft(site, layer, shared, self.facts)

    def peft_config(self, model: nn.Module, anatomy: Anatomy) -> Any:
        """PEFT's configuration for these settings on this model.

        Raises:
            SettingsError: PEFT refuses it.
        """
        paths = self.sites(model, anatomy)
        values = self.given()
        for name in self.facts.named:
            inside = set(paths) & set(self._named(name, anatomy))
            values[name] = _short([p for p in paths if p in inside], paths, model)
        known = {f.name for f in dataclasses.fields(self.config)}
        if "target_modules" in known and self.facts.how == "layers":
            values["target_modules"] = _short(paths, paths, model)
        return self._configured(values | self.own_values())

    def given(self) -> dict[str, Any]:
        """The settings that PEFT has too, as it takes them."""
        given = {name: as_theirs(getattr(self, name)) for name in _offered_names(type(self))}
        return {name: value for name, value in given.items() if value is not None}

    def own_values(self) -> dict[str, Any]:
        """Values of PEFT's that no setting gives."""
        return {}

    def _configured(self, values: Mapping[str, Any]) -> Any:
        try:
            with quiet():
                return self.config(**values)
        except (ValueError, TypeError) as error:
            raise SettingsError(str(refusal(error, self.name()))) from error

    def _named(self, name: str, anatomy: Anatomy) -> list[str]:
        names = getattr(self, name)
        present = tuple(n for n in names if names != self.facts.named[name] or n in anatomy.roles())
        return anatomy.resolve(present, kinds=self.kinds, who=self.name()) if present else []

    # -- files -----------------------------------------------------------------------------------------------------

    def to_file(self, model: nn.Module, adapter: Adapter, state: State) -> State:
        """By PEFT's keys; what PEFT does not save can be made again."""
        names, more = self._file_names(model, adapter)
        return {theirs: state[ours].clone() for theirs, ours in names.items()} | more

    def from_file(self, model: nn.Module, adapter: Adapter, tensors: State) -> State:
        state = {key: value.detach() for key, value in adapter.own_state().items()}
        names, more = self._file_names(model, adapter)
        found = {key: value for key, value in tensors.items() if INSIDE not in key}
        check_fit(found, {theirs: state[ours] for theirs, ours in names.items()} | more, "the adapter")
        if more:
            put(model, bank_of(adapter), layers_of(adapter), found)
        return state | {ours: found[theirs] for theirs, ours in names.items()}

    def _file_names(self, model: nn.Module, adapter: Adapter) -> tuple[dict[str, str], State]:
        return file_names(model, bank_of(adapter), layers_of(adapter), adapter.own_state())

    def file_config(self, adapter: Adapter) -> dict[str, Any]:
        return plain_config(bank_of(adapter).config)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        known = _offered_names(cls)
        foreign = [k for k, v in config.items() if v and k not in known and k not in OURS]
        odd = [k for k in foreign if k in {f.name for f in dataclasses.fields(cls.config)}] or foreign
        if odd:
            raise SettingsError(f"{cls.name()} has no setting {odd[0]!r}, which the file gives as {config[odd[0]]!r}")
        usually = usual(cls.config)
        settings = {
            name: value
            for name, value in from_config(config, known).items()
            if name not in cls.facts.named and not (name in WITHHELD and value == usually[name])
        }
        settings |= {name: as_setting(config[name]) for name in cls.facts.named if config.get(name) is not None}
        targets = config.get("target_modules")
        if targets and cls.facts.how == "layers":
            settings["targets"] = targets if isinstance(targets, str) else tuple(targets)
        if config.get("exclude_modules"):
            settings["exclude"] = as_setting(config["exclude_modules"])
        if (layers := config.get("layers_to_transform")) is not None:
            settings["layers"] = ",".join(map(str, layers if isinstance(layers, list) else [layers]))
        return settings


def method_class(tuner: str) -> type[PeftMethod]:
    """The class of `peft:tuner`, with the settings of PEFT's configuration class."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    known = facts(tuner)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(tuner.upper())]
    targets = setting(known.targets, "roles, leaf names, paths, all-linear, or a regex over paths")
    made: type[PeftMethod] = dataclasses.make_dataclass(
        f"Peft_{tuner}",
        [("targets", str | tuple[str, ...], targets), *offered(config, known)],
        bases=(_base(known),),
        namespace={
            "tuner": tuner,
            "config": config,
            "facts": known,
            "traits": _traits(known),
            "kinds": _kinds(known),
            "aliases": aliases(config),
            "small": known.small,
            "reads": ("task_ids",) if known.of_tasks else (),
            "__module__": __name__,
        },
        frozen=True,
        kw_only=True,
    )
    return made


def _base(known: Facts) -> type[PeftMethod]:
    if known.allocates is not None:
        from pegbox.peft_bridge.allocating import Ranks, Subspaces

        return Ranks if known.allocates == "ranks" else Subspaces
    if known.how not in ("prompt", "prefix"):
        return PeftMethod
    from pegbox.peft_bridge.prompts import PrefixMethod, PromptMethod

    return PromptMethod if known.how == "prompt" else PrefixMethod


def _traits(known: Facts) -> Traits:
    seam = {"layers": "output", "attention": "output", "prompt": "tokens", "prefix": "tokens"}[known.how]
    return Traits(
        seams=(seam,),  # type: ignore[arg-type]
        identity=known.identity,
        merge="exact" if known.merges else "no",
        per_row=known.per_row,
        packs=known.how != "prompt",
        needs=known.needs,
        xfail=known.xfail,
    )


def _kinds(known: Facts) -> tuple[type[nn.Module], ...]:
    return KINDS[known.kinds]


MATRICES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linears": (nn.Linear,),
    "lookups": (nn.Embedding,),
    "matrices": MATRICES,
    "modules": (nn.Module,),
}


def _offered_names(cls: type[Method]) -> list[str]:
    ours = {f.name for f in dataclasses.fields(Method)}
    return [f.name for f in dataclasses.fields(cls) if f.name not in ours]


def plain_config(config: Any) -> dict[str, Any]:
    """PEFT's configuration as its file has it."""
    plain = {k: as_setting(v) for k, v in config.to_dict().items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()} | {"inference_mode": True}


def _with_tied(paths: list[str], model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The paths, and those of modules in a role (T5's `shared`, which never runs, has none) with a weight of theirs."""
    known = {path for found in anatomy.roles().values() for path in found} | set(paths)
    named = [(path, module) for path, module in model.named_modules() if path in known]
    weights = {id(m._parameters.get("weight")) for path, m in named if path in paths} - {id(None)}
    return [path for path, m in named if path in paths or id(m._parameters.get("weight")) in weights]


def _short(some: list[str], paths: list[str], model: nn.Module) -> list[str]:
    """Paths as leaf names where these name `paths` and nothing else; PEFT groups layers by the names it is given."""
    leaves = {path.rpartition(".")[2] for path in paths}
    named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted({p.rpartition(".")[2] for p in some}) if named == set(paths) else some


def bank_of(adapter: Adapter) -> Bank:
    assert isinstance(adapter.shared, Bank)
    return adapter.shared


def layers_of(adapter: Adapter) -> dict[str, nn.Module]:
    grafts = {path_of(key): graft for key, graft in adapter.grafts.items()}
    return {path: graft.layer for path, graft in grafts.items() if isinstance(graft, LayerGraft)}
