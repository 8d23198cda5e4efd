"""An adapter: all that one method has learned on one base, under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pegbox.core import storage
from pegbox.core.context import Context
from pegbox.core.errors import AdapterError, TargetError
from pegbox.core.fingerprint import BaseDrift
from pegbox.core.graft import CopyGraft, Graft
from pegbox.core.layout import is_linear
from pegbox.core.method import Anatomy, Method
from pegbox.core.parts import Part, assemble, chosen_rows, parse
from pegbox.core.seeding import seeded
from pegbox.core.site import ModuleSite, Site

State = dict[str, Tensor]
T = TypeVar("T", bound=Tensor)


class Adapter(nn.Module):
    """The grafts, shared parameters and trained copies of one method, in a tree of their own.

    A state's keys: `graft.PATH.NAME`, `shared.NAME`, `copy.NAME` with the base's own name of the copied parameter
    and, for a method that trains the base's own tensors, `base.NAME`.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.grafts = nn.ModuleDict()
        self.copies = nn.ModuleDict()
        self.shared: nn.Module | None = None
        self.selected: tuple[str, ...] = ()
        self.trained: frozenset[str] = frozenset()  # own parameters that were trainable when built
        self.resting: frozenset[str] = frozenset()  # those of `ever` that do not train now
        self.base_drift: BaseDrift | None = None  # of the base here from the one it was trained on, kept otherwise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Follow the base to a device, never to a dtype: masters stay float32."""
        return super()._apply(lambda t: t.to(fn(torch.empty(0, device=t.device)).device), recurse)

    @property
    def ever(self) -> frozenset[str]:
        """State keys of all that it trains, now or at another time."""
        return self.trained | {f"base.{n}" for n in self.selected}

    @property
    def selected_now(self) -> frozenset[str]:
        """State keys of the base's tensors that it trains now."""
        return frozenset(f"base.{n}" for n in self.selected) - self.resting

    def own(self) -> dict[str, nn.Parameter]:
        """Parameters of the grafts by state key; shared ones once."""
        return {_state_key(name): p for name, p in _once(self.named_parameters(remove_duplicate=False)).items()}

    def own_state(self) -> State:
        """Parameters and buffers of the grafts by state key."""
        return {_state_key(name): value for name, value in _once(self.state_dict(keep_vars=True).items()).items()}

    @torch.no_grad()
    def inherit(self, other: Adapter, called: str) -> None:
        """Take over what another adapter of the same method has learned, as `Method.inherited` says.

        Raises:
            AdapterError: it is of another method, is at a site where this one is not, or does not fit.
        """
        if type(self.method) is not type(other.method):
            raise AdapterError(f"{called} is of {other.method.name()}, and {self.method.name()} cannot go on from it")
        if strange := sorted(other.grafts.keys() - self.grafts.keys()):
            raise AdapterError(
                f"{called} changes {path_of(strange[0]) or 'the model'}, and this one does not: use its targets"
            )
        new = [(dict(self.copies.state_dict()), dict(other.copies.state_dict()))]
        for key, graft in other.grafts.items():
            own = dict(self.grafts[key].state_dict())
            values = self.method.inherited(other.method, own, graft.state_dict())
            check_fit(values, own, f"what {called} has at {path_of(key) or 'the model'}")
            new.append((own, values))
        if self.shared is not None and other.shared is not None:
            own, values = dict(self.shared.state_dict()), dict(other.shared.state_dict())
            check_fit(values, own, f"what the grafts of {called} share")
            new.append((own, values))
        for own, values in new:
            for key in own.keys() & values.keys():
                own[key].copy_(values[key])


def build(
    method: Method, model: nn.Module, anatomy: Anatomy, site_at: SiteAt, *, also_train: Iterable[str], seed: int
) -> tuple[Adapter, dict[str, Graft]]:
    """A new adapter, and its grafts by path; nothing in the model has changed if this raises.

    Every graft is drawn from a seed of its own, made of `seed` and its path, so that neither the global generator nor
    the order of sites matters.
    """
    adapter = Adapter(method)
    copies = _copied_paths(anatomy, also_train)
    with seeded(seed, "shared"):
        adapter.shared = method.shared(model, anatomy)
    by_path: dict[str, Graft] = {}
    parts: dict[str, list[tuple[Part, Graft]]] = {}  # by path of the module that holds them
    for path in method.sites(model, anatomy):
        if any(path == c or path.startswith((f"{c}.", f"{c}[")) for c in copies):
            continue  # trained whole already
        site = site_at(path)
        _check_storage(site)
        with seeded(seed, path):
            graft = method.graft(site, adapter.shared)
        if graft is None:
            continue
        adapter.grafts[module_key(path)] = graft.to(site.device)
        if isinstance(site, Part):
            parts.setdefault(site.owner.path, []).append((site, graft))
        else:
            by_path[path] = graft
    for path, members in parts.items():
        if path in by_path:
            raise TargetError(f"targets name {path!r} and rows of it, {members[0][0].path!r}; name one of them")
        by_path[path] = assemble(site_at.module(path), tuple(members))
    for path in copies:
        copied = site_at.module(path)
        check_plain(copied.module, path, f"also_train copies {path!r}")
        graft = CopyGraft(copied.module)
        by_path[path] = graft
        adapter.copies[module_key(path)] = graft
    adapter.selected = tuple(method.selects(model, anatomy))
    check_plain(model, "", f"{method.name()} trains the base's own tensors", adapter.selected)
    adapter.trained = frozenset(key for key, p in adapter.own().items() if p.requires_grad)
    if not adapter.trained and not adapter.selected:
        raise TargetError(f"{type(method).__name__} found nothing to train in {type(model).__name__}")
    return adapter, by_path


class SiteAt:
    """Sites by path, made when first asked for, released again if the adapter is not completed."""

    def __init__(self, model: nn.Module, known: dict[str, ModuleSite], context: Context) -> None:
        self.modules, self.known, self.context = dict(model.named_modules()), known, context
        self.made: list[ModuleSite] = []

    def __call__(self, path: str) -> Site:
        """Of a module, or of a matrix that is not a whole module's weight.

        Raises:
            TargetError: neither.
        """
        matrix = parse(path, self.modules)
        if matrix is None:
            return self.module(path)
        owner = self.module(matrix.owner)
        named = self.context.anatomy.parts(matrix.whole)
        return Part(path, owner, matrix.parameter, chosen_rows(matrix, *owner.locate(matrix.parameter), named))

    def module(self, path: str) -> ModuleSite:
        """Of a module."""
        if path not in self.known:
            site = ModuleSite(path, self.modules[path], self.context)
            if any(isinstance(self.modules[p], nn.TransformerEncoderLayer) for p in _ancestors(path)):
                site.forbid_fast_path()
            self.known[path] = site
            self.made.append(site)
        return self.known[path]

    def undo(self) -> None:
        for site in self.made:
            site.release()
            del self.known[site.path]


def _check_storage(site: Site) -> None:
    """Refuse what is quantised and no linear layer."""
    if site.quantised is not None and not (isinstance(site, Part) or is_linear(site.module)):
        raise TargetError(
            f"{site.path} is a {type(site.module).__name__} kept as {site.quantised}; of quantised modules only linear "
            "layers take adapters: exclude it, or load the model without quantising it"
        )


def check_plain(model: nn.Module, path: str, why: str, names: tuple[str, ...] | None = None) -> None:
    """Refuse to train tensors that are kept quantised: those of `names`, or all of a module's."""
    if names == ():
        return
    quantised = storage.quantised_parameters(model)
    wrong = [name for name in (quantised if names is None else names) if name in quantised]
    if wrong:
        name = f"{path}.{wrong[0]}" if path else wrong[0]
        raise TargetError(
            f"{why}, and {name} is kept as {quantised[wrong[0]]}, which has no gradient ({len(wrong)} such tensors); "
            "leave it out with exclude, train it by a method that maps weights (lora), or load the model without "
            "quantising it"
        )


def _once(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Each tensor under one name: that of the shared tree if it is there, else the first."""
    listed = list(named)
    names = {id(value): name for name, value in reversed(listed)}
    names |= {id(value): name for name, value in listed if name.startswith("shared.")}
    return {name: value for name, value in listed if names[id(value)] == name}


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def check_fit(have: State, want: State, what: str) -> None:
    """Raise AdapterError unless two states have the same keys and shapes."""
    missing, unexpected = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing or unexpected:
        wrong = {"missing": missing, "unexpected": unexpected}
        parts = [f"{len(keys)} keys {word} (first: {keys[0]})" for word, keys in wrong.items() if keys]
        raise AdapterError(f"{what} does not fit this model and method: {', '.join(parts)}")
    for key, value in want.items():
        if have[key].shape != value.shape:
            raise AdapterError(
                f"{what} does not fit: {key} is {tuple(have[key].shape)} in the file, {tuple(value.shape)} in the model"
            )
        if have[key].is_floating_point() != value.is_floating_point():
            raise AdapterError(
                f"{what} does not fit: {key} is {have[key].dtype} in the file, {value.dtype} in the model"
            )


def _copied_paths(anatomy: Anatomy, also_train: Iterable[str]) -> list[str]:
    names = tuple(also_train)
    return anatomy.resolve(names, kinds=(nn.Module,), who="also_train") if names else []


def module_key(path: str) -> str:
    """A path as a ModuleDict key, which may not hold dots."""
    return path.replace(".", "/") or "(model)"


def path_of(key: str) -> str:
    """The inverse of `module_key`."""
    return "" if key == "(model)" else key.replace("/", ".")


def _state_key(name: str) -> str:
    """`grafts.a/b.w` -> `graft.a.b.w`."""
    tree, _, rest = name.partition(".")
    if tree == "shared":
        return name
    key, _, leaf = rest.partition(".")
    word = {"grafts": "graft", "copies": "copy"}[tree]
    if tree == "copies":
        leaf = leaf.removeprefix("values.").replace("/", ".")
    path = path_of(key)
    return f"{word}.{path}.{leaf}" if path else f"{word}.{leaf}"
