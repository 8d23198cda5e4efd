"""A tuned model: a base and the grafts of its adapters, in two separate trees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pegbox.core import adapter as adapters_
from pegbox.core import storage
from pegbox.core.adapter import Adapter, SiteAt, State, check_fit
from pegbox.core.causal_attention import in_blocks
from pegbox.core.compose import Plan, Stack, Sum, as_plan, chain
from pegbox.core.context import Context
from pegbox.core.errors import (
    CannotDisable,
    CannotMerge,
    CannotMix,
    MethodError,
    SettingsError,
    did_you_mean,
)
from pegbox.core.graft import CopyGraft
from pegbox.core.method import Anatomy, Method
from pegbox.core.parts import Assembled, Blocks
from pegbox.core.reference import Reference
from pegbox.core.rows import guard_experts
from pegbox.core.settings import check
from pegbox.core.sharded import copy_whole
from pegbox.core.site import Base, ModuleSite, Site
from pegbox.core.watch import bypasses_refused


class Tuned(nn.Module):
    """A base model with adapters around its modules.

    The base keeps its keys, classes and, unless a method trains them, its tensors.  What `Tuned` does not define is
    looked up on the base (`tuned.config`, `tuned.generate(...)`).

    Args:
        model: any `nn.Module`; frozen here, except what the method trains.
        anatomy: its roles, from `pegbox.anatomy.of(model)`.
        method: the first adapter's method, or None to start with no adapter.
        name: the first adapter's name.
        also_train: modules to train whole beside the method, a new classification head say.
        seed: of every draw that builds the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        method: Method | None = None,
        *,
        name: str = "default",
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(model, Tuned) or any(isinstance(m.__dict__.get("forward"), Site) for m in model.modules()):
            raise MethodError("this model is tuned already; give it another adapter with tuned.add(name, method)")
        self.model = model
        self.adapters = nn.ModuleDict()
        self.anatomy = anatomy
        self.context = Context(anatomy)
        self._sites: dict[str, ModuleSite] = {}
        self._plan: Plan | None = None
        self._required = {n: p.requires_grad for n, p in model.named_parameters()}
        self._unmerged: dict[str, tuple[nn.Module, str, nn.Parameter | nn.Module]] | None = None  # while merged
        self._untied = False  # whether merging told the config so
        self.merge_drift: dict[str, storage.Drift] = {}  # by path of a matrix that merging has encoded anew
        self._still = storage.still(model)  # attributes of quantised modules, as they were
        self._watched = True  # whether no site is known to be bypassed
        self.module_rates: dict[str, float] = {}  # multiples of the learning rate, by path of a module trained whole
        if method is not None:
            self.add(name, method, also_train=also_train, seed=seed)

    # -- adapters ------------------------------------------------------------------------------------------------

    def add(self, name: str, method: Method, *, also_train: Sequence[str] = (), seed: int = 0) -> Self:
        """Put another adapter on the base and use it.

        Raises:
            SettingsError, TargetError: from the method and its targets; the model is as it was.
            CannotMix: the method trains the base's own tensors and is not alone, or another here does.
        """
        if not isinstance(method, Method):
            raise SettingsError(f"add takes a method with its settings, pegbox.method('lora', rank=16), got {method!r}")
        check(method, what=method.name())
        self._check_alone(name, method)
        if self._unmerged is not None:
            raise MethodError(f"this model is merged; unmerge() before it is given another adapter, {name!r}")
        site_at = SiteAt(self.model, self._sites, self.context)
        try:
            adapter, grafts = adapters_.build(
                method, self.model, self.anatomy, site_at, also_train=also_train, seed=seed
            )
        except BaseException:
            site_at.undo()
            raise
        self.adapters[name] = adapter.train(self.training)
        self._watched = False
        for path, graft in grafts.items():
            self._sites[path].grafts[name] = graft
        self.use(name)
        return self

    def _check_alone(self, name: str, method: Method) -> None:
        if not name or "." in name:
            raise MethodError(f"an adapter's name is text without dots, got {name!r}")
        if name in self.adapters:
            raise MethodError(f"there is an adapter {name!r} already; choose another name")
        whole = [n for n, a in self._adapters().items() if not a.method.traits.keeps_base]
        if whole or (len(self.adapters) and not method.traits.keeps_base):
            trains = whole[0] if whole else name
            raise CannotMix(f"adapter {trains!r} trains the base's own tensors, so it shares the model with no other")

    def remove(self, name: str, then: str | Plan | None = None) -> Self:
        """Drop an adapter; use `then`, or nothing."""
        self.adapter(name)
        for site in list(self._sites.values()):
            site.grafts.pop(name, None)
            site.chain = ()
            if not site.grafts:
                site.release()
                del self._sites[site.path]
        del self.adapters[name]
        self._plan = None
        if not self.adapters:
            self._restore_requires_grad()
        return self.use(then) if then else self

    def remake(self, name: str, method: Method, seed: int = 0) -> Self:
        """Build an adapter again with other settings, new ranks say; what its grafts have learned is forgotten.

        Modules trained whole keep their values.
        """
        plan, copies = self._plan, self.adapter(name).copies
        self.remove(name)
        self.add(name, method, also_train=[adapters_.path_of(key) for key in copies], seed=seed)
        self.adapter(name).copies.load_state_dict(copies.state_dict())
        return self if plan is None else self.use(plan)

    def inherit(self, name: str, other: str) -> Self:
        """Let one adapter start from what another of the same method has learned, as `Method.inherited` says.

        A site, or a module trained whole, that the other does not have keeps its draws.

        Raises:
            AdapterError: the other is of another method, is at a site where this one is not, or does not fit.
        """
        self.adapter(name).inherit(self.adapter(other), f"the adapter {other!r}")
        return self

    def use(self, plan: str | Stack | Sum | Sequence[str]) -> Self:
        """Choose what runs: one adapter, `Stack("a", "b")`, or `Sum(a=0.5, b=0.5)`; only these train."""
        plan = as_plan(plan)
        for name in plan.names:
            self.adapter(name)
        chains = {path: chain(plan, site.grafts) for path, site in self._sites.items()}
        for path, site in self._sites.items():
            site.chain = chains[path]
        self._plan = plan
        self._set_requires_grad(plan.names)
        return self

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use."""
        return self._plan.names if self._plan else ()

    def adapter(self, name: str | None = None) -> Adapter:
        """An adapter by name; the one in use if none is given."""
        if name is None:
            if len(self.active) != 1:
                raise MethodError(f"{len(self.active)} adapters are in use, so one must be named{_one_of(self)}")
            name = self.active[0]
        if name not in self.adapters:
            raise MethodError(f"no adapter {name!r}{did_you_mean(name, self.adapters)}")
        return self._adapters()[name]

    @property
    def sites(self) -> dict[str, Site]:
        """What has grafts of its own, by path: modules, and matrices that are no module's own."""
        found: dict[str, Site] = {}
        for path, site in self._sites.items():
            for graft in site.grafts.values():
                held = (
                    {part.path: part for part, _ in graft.members}
                    if isinstance(graft, (Assembled, Blocks))
                    else {path: site}
                )
                found |= held
        return found

    @property
    def method(self) -> Method:
        """The method of the adapter in use."""
        return self.adapter().method

    def _adapters(self) -> dict[str, Adapter]:
        return dict(self.adapters.items())  # type: ignore[arg-type]

    def _set_requires_grad(self, names: Iterable[str]) -> None:
        for name, adapter in self._adapters().items():
            for key, parameter in adapter.own().items():
                parameter.requires_grad_(name in names and key in adapter.trained and key not in adapter.resting)
        now = {key for name in names for key in self._adapters()[name].selected_now}
        for n, parameter in self.model.named_parameters():
            parameter.requires_grad_(f"base.{n}" in now)

    # -- running -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """The base's forward.  `labels` is named because trainers look for it in the signature.

        What adapters read from the context may be given here too (`tuned(**batch, task_ids=ids)`); those not in use
        leave it.

        Raises:
            MethodError: a value for the context that they cannot use.
            TargetError: in the first forward with a new adapter, a module that has a graft is read and never called.
        """
        if labels is not None:
            kwargs["labels"] = labels
        words = self._words(self.adapters)
        if any(word in kwargs for word in words):
            with self.given(**self.aside(kwargs)):
                return self.forward(*args, **{key: value for key, value in kwargs.items() if key not in words})
        self.context.mask = _mask(kwargs)
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        watch = contextlib.nullcontext() if self._watched else bypasses_refused(self._sites, self.context)
        with watch, in_blocks(self.model):
            out = self.model(*args, **kwargs)
        self._watched = True
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base: a DPO reference, a teacher, a baseline.

        Raises:
            CannotDisable: the method trains the base's own tensors.
        """
        moved = [n for n in self.active if not self.adapter(n).method.traits.keeps_base]
        if moved:
            raise CannotDisable(
                f"adapter {moved[0]!r} trains the base's own tensors; load the base again for a reference"
            )
        before, self.context.bare = self.context.bare, True
        try:
            yield
        finally:
            self.context.bare = before

    def reference(self) -> Reference:
        """The base as a model of its own, that shares every tensor with this one: `ref_model=tuned.reference()`.

        Raises:
            CannotDisable: the method trains the base's own tensors.
        """
        return Reference(self)

    @contextlib.contextmanager
    def given(self, **values: Any) -> Iterator[None]:
        """Inside, the adapters in use find `values` in the context, by the names in their methods' `reads`.

            with tuned.given(hint=edges):
                tuned(latents, timesteps, encoder_hidden_states=text)

        Raises:
            MethodError: a name that no adapter in use reads, or a value that one cannot use.
        """
        known = self._words(self.active)
        if unknown := [word for word in values if word not in known]:
            raise MethodError(
                f"no adapter in use reads {unknown[0]!r} from the context{did_you_mean(unknown[0], known)}"
            )
        for name in self.active:
            self.adapter(name).method.check_given(values)
        before, self.context.given = self.context.given, {**self.context.given, **values}
        try:
            yield
        finally:
            self.context.given = before

    def aside(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a call's arguments is for the adapters in use, and not for the base."""
        return {word: inputs[word] for word in self._words(self.active) if word in inputs}

    def _words(self, names: Iterable[str]) -> list[str]:
        """What some adapters read from the context."""
        return [word for name in names for word in self.adapter(name).method.reads]

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch uses adapter `names[i]`, or the base where it is None.

        A backward pass belongs inside too when gradient checkpointing is on, since it runs forwards again.
        """
        for name in {n for n in names if n is not None}:
            method = self.adapter(name).method
            if not method.traits.per_row:
                raise CannotMix(f"adapter {name!r} ({type(method).__name__}) cannot differ from row to row")
        before, self.context.rows = self.context.rows, tuple(names)
        guard = guard_experts(self.model, self._sites, tuple(names))
        try:
            yield
        finally:
            self.context.rows = before
            guard()

    # -- training ------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains now, by state key."""
        own = {k: p for name in self.active for k, p in self._prefixed(name) if p.requires_grad}
        base = {f"base.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        return own | base

    def _ever(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains now or rests."""
        lone = len(self.active) == 1
        resting = {k if lone else f"{name}:{k}" for name in self.active for k in self.adapter(name).resting}
        own = {k: p for name in self.active for k, p in self._prefixed(name) if p.requires_grad or k in resting}
        base = {f"base.{n}": p for n, p in self.model.named_parameters()}
        return own | {k: p for k, p in base.items() if p.requires_grad or k in resting}

    def _prefixed(self, name: str) -> list[tuple[str, nn.Parameter]]:
        lone = len(self.active) == 1
        return [(k if lone else f"{name}:{k}", p) for k, p in self.adapter(name).own().items()]

    def select(self, keys: Iterable[str] | None, name: str | None = None) -> Self:
        """Choose which of the tensors that an adapter trains, train now; the others rest: no gradient is made or kept.

        A method that trains its tensors in turn calls this in `before_step`; `pegbox.Callback` then frees what an
        optimizer holds for those that rest.

        Args:
            keys: as those of its `state`; None for all that it ever trains, as before the first call.

        Raises:
            MethodError: a key of nothing that the adapter trains.
        """
        adapter = self.adapter(name)
        ever = adapter.ever
        wanted = ever if keys is None else frozenset(keys)
        if unknown := sorted(wanted - ever):
            kind = type(adapter.method).__name__
            raise MethodError(f"{unknown[0]!r} is nothing that {kind} trains{did_you_mean(unknown[0], sorted(ever))}")
        if adapter.resting != ever - wanted:
            adapter.resting = ever - wanted
            self._set_requires_grad(self.active)
            for parameter in self._ever().values():
                parameter.grad = parameter.grad if parameter.requires_grad else None
        return self

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimizer parameter groups: each learning rate and decay once; vectors are not decayed.

        `module_rates` multiplies the rate of modules that are trained whole: `tuned.module_rates["classifier"] = 10`
        that of a head.  Groups hold what rests now (see `select`) as well.  What a growing method has taken on later is
        in groups of its own, in the order of the steps at which it was `born`.
        """
        grafts = [graft for name in self.active for graft in self.adapter(name).grafts.values()]
        multiples, born = _of_parameters(grafts, "rates"), _of_parameters(grafts, "born")
        grouped: dict[tuple[int, float, float], dict[str, Any]] = {}
        for key, p in self._ever().items():
            rate = lr * multiples.get(id(p), 1.0) * self._multiple(key)
            at = (int(born.get(id(p), 0)), rate, weight_decay if p.ndim > 1 else 0.0)
            kept = {"params": [], "names": [], "lr": at[1], "weight_decay": at[2], "born": at[0]}
            group = grouped.setdefault(at, kept)
            group["params"].append(p)
            group["names"].append(key)
        return sorted(grouped.values(), key=lambda group: group["born"])

    def _multiple(self, key: str) -> float:
        """What `module_rates` say of a tensor, by its state key."""
        path = key.partition(".")[2]
        return next((by for place, by in self.module_rates.items() if path.startswith(f"{place}.")), 1.0)

    def extra_losses(self) -> dict[str, Tensor]:
        """Terms of the loss beside the objective's, by name: of the methods, and what grafts left in the last forward.

        The latter are handed out once.
        """
        terms = dict(self.context.losses)
        self.context.losses.clear()
        terms |= self._penalties()
        self.context.routes.clear()
        return terms

    def _penalties(self) -> dict[str, Tensor]:
        terms = {}
        for name in self.active:
            term = self.adapter(name).method.penalty(self)
            if term is not None:
                terms[f"penalty_{name}" if len(self.active) > 1 else "penalty"] = term
        return terms

    def penalty(self) -> Tensor | float:
        """The sum of `extra_losses`, for a loop of one's own: `loss = model(**batch).loss + model.penalty()`."""
        return sum(self.extra_losses().values(), start=0.0)

    def print_trainable_parameters(self) -> None:
        """One line: how many parameters train, of how many."""
        some, all_ = self.count()
        print(f"trainable params: {some:,} || all params: {all_:,} || trainable%: {100 * some / all_:.4f}")

    def count(self) -> tuple[int, int]:
        """Parameters that train, and all parameters of base and adapters in use."""
        own = sum(p.numel() for name in self.active for p in self.adapter(name).own().values())
        some = sum(p.numel() for p in self.trainable().values())
        return some, own + sum(p.numel() for p in self.model.parameters())

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self, name: str | None = None) -> State:
        """Everything an adapter has learned, and nothing else; detached, not copied."""
        adapter = self.adapter(name)
        base = dict(self.model.named_parameters())
        state = {k: v.detach() for k, v in adapter.own_state().items()}
        return state | {f"base.{n}": base[n].detach() for n in adapter.selected}

    @torch.no_grad()
    def load_state(self, state: State, name: str | None = None) -> None:
        """Copy a state into an adapter.

        Raises:
            AdapterError: other keys or shapes than this adapter's; nothing is changed.
        """
        want = self.state(name)
        check_fit(state, want, "the adapter")
        for key, value in want.items():
            copy_whole(value, state[key])

    def save(self, directory: Any, name: str | None = None) -> None:
        """Write an adapter as `adapter_config.json` and `adapter_model.safetensors` (see `pegbox.core.files`)."""
        from pegbox.core.files import save

        save(self, directory, name)

    # -- leaving -------------------------------------------------------------------------------------------------

    def detach(self) -> nn.Module:
        """Take every graft off and give back the base, its tensors, flags and forwards as they were."""
        if self._unmerged is not None:
            self.unmerge()
        for site in self._sites.values():
            site.release()
        self._sites.clear()
        for module, attribute, before in self._still:
            setattr(module, attribute, before)
        self._restore_requires_grad()
        return self.model

    def _restore_requires_grad(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required.get(name, True))

    @torch.no_grad()
    def merge(self, *, requantise: bool = False) -> nn.Module:
        """Fold the adapters in use into the base's weights and give it back, without grafts.

        All or nothing.  The original tensors are kept until `unmerge` or until this object is gone.  A merged weight
        that was tied to another is its own from then on, and `config.tie_word_embeddings` says so.

        Args:
            requantise: keep a quantised matrix quantised, in the same way; `merge_drift` then says how far that moves
                it.  Otherwise a layer of plain numbers takes its place, equal to what was trained.

        Raises:
            CannotMerge: a graft changes more than a weight.
            MethodError: it is merged already.
        """
        if self._unmerged is not None:
            raise MethodError("this model is merged already; unmerge() comes first")
        for path, site in self._sites.items():
            for graft in site.chain:
                if not graft.maps and not isinstance(graft, CopyGraft):
                    raise CannotMerge(
                        f"{type(graft).__name__} at {path or 'the model'} acts on activations, not on a weight"
                    )
        merged = [(site, *pair) for site in self._sites.values() for pair in _merged(site)]
        kept = [_in_place_of(*entry, requantise) for entry in merged]
        self._unmerged, self.merge_drift = {}, {}
        for entry, packed in zip(merged, kept, strict=True):
            if packed is None:
                self._swap(*entry)
        for entry, packed in zip(merged, kept, strict=True):
            if packed is not None:
                self._rebuild(*entry, packed)
        for site in self._sites.values():
            site.release()
        return self.model

    def _swap(self, site: ModuleSite, dotted: str, value: Tensor) -> None:
        owner, leaf = site.locate(dotted)
        kept: nn.Parameter = getattr(owner, leaf)
        assert self._unmerged is not None
        self._unmerged[f"{site.path}.{dotted}"] = (owner, leaf, kept)
        self._untied = _untie(self.model, kept) or self._untied
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))

    def _rebuild(self, site: ModuleSite, dotted: str, value: Tensor, kept: Tensor) -> None:
        """Another layer in the place of a quantised one, which keeps `kept` for the merged `value`."""
        path = ".".join(word for word in (site.path, dotted.rpartition(".")[0]) if word)
        layer, leaf = site.locate(dotted)
        parent, _, child = path.rpartition(".")
        holder, rebuilt = self.model.get_submodule(parent), storage.rebuilt(layer, leaf, kept)
        assert self._unmerged is not None
        self._unmerged[f"{path} whole"] = (holder, child, layer)
        if kept is not value:
            self.merge_drift[path] = storage.drift(layer, rebuilt, leaf, value)
        setattr(holder, child, rebuilt)

    def unmerge(self) -> Self:
        """Undo `merge`: the very tensors of before, and the grafts around them."""
        if self._unmerged is None:
            raise MethodError("there is nothing to unmerge; merge() comes first")
        for owner, leaf, kept in reversed(list(self._unmerged.values())):
            setattr(owner, leaf, kept)
        if self._untied:
            self.model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        self._unmerged, self._untied = None, False
        for site in self._sites.values():
            site.module.forward = site
        return self


def _merged(site: ModuleSite) -> list[tuple[str, Tensor]]:
    """(parameter, its merged value as the module keeps it) for one site; of a quantised one, as plain numbers."""
    base = Base(site, site.chain)
    mapped = dict.fromkeys(parameter for graft in site.chain for parameter in graft.maps)
    out = [(p, site.stored(p, base.read(p), _plain_dtype(site, p))) for p in mapped]
    for graft in site.chain:
        if isinstance(graft, CopyGraft):
            kept = dict(site.module.named_parameters())
            out += [(n, v.detach().to(kept[n].dtype).clone()) for n, v in graft.current().items()]
    return out


def _in_place_of(site: ModuleSite, parameter: str, value: Tensor, requantise: bool) -> Tensor | None:
    """What is kept in the place of a quantised parameter: the merged value, or that encoded; None of a plain one."""
    module, leaf = site.locate(parameter)
    if storage.name(module, leaf) is None:
        return None
    return storage.encoded(module, leaf, value) if requantise else value


def _plain_dtype(site: ModuleSite, parameter: str) -> torch.dtype | None:
    """What plain numbers in the place of quantised ones are kept in: what the model keeps the rest in."""
    if storage.name(*site.locate(parameter)) is None:
        return None
    return storage.rest_dtype(site.context.anatomy.model)


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which positions are no padding, where all modules see the same ones."""
    mask = inputs.get("attention_mask")
    one_stack = not any(name.startswith("decoder_") for name in inputs)
    return mask if one_stack and isinstance(mask, Tensor) and mask.ndim == 2 else None


def _untie(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Note in the config that a tensor about to be replaced is no longer shared; whether there was need to."""
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    config = getattr(model, "config", None)
    if len(names) < 2 or not getattr(config, "tie_word_embeddings", False):
        return False
    config.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def _of_parameters(grafts: Iterable[nn.Module], word: Literal["rates", "born"]) -> dict[int, float]:
    """What grafts say of parameters of their own, by id."""
    out: dict[int, float] = {}
    for graft in grafts:
        own = dict(graft.named_parameters())
        out |= {id(own[name]): value for name, value in getattr(graft, word)().items()}
    return out


def _one_of(tuned: Tuned) -> str:
    return f"; there are: {', '.join(tuned.adapters)}" if len(tuned.adapters) else ""
