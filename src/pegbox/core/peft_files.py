"""HF PEFT's terms for an adapter: its keys and shapes of the tensors, its configuration; both ways.

What PEFT's files look like is data of the methods (`traits.peft`), or a method's own word (`file_config`, `to_file`,
`from_file`).  Nothing here touches a disk: see `pegbox.core.files`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pegbox.core import peft_shapes
from pegbox.core.adapter import Adapter, State, path_of
from pegbox.core.errors import AdapterError, SettingsError
from pegbox.core.method import Method, PeftLayout
from pegbox.core.site import Site
from pegbox.core.tuned import Tuned

PEFT_ROOT = "base_model.model."
PROMPT_ROOT = "base_model."  # the same in the file of a prompt, where PEFT puts nothing around the model
Bridge = Callable[[Mapping[str, Any], str | None], "type[Method] | None"]


# -- tensors -----------------------------------------------------------------------------------------------------


def to_file(tuned: Tuned, adapter: Adapter, state: State) -> State:
    """A state as the file has it: by the method's own word, else in PEFT's keys and shapes, where PEFT has the method.

    Args:
        state: of the adapter, by Pegbox's keys.
    """
    copies = {key: value for key, value in state.items() if key.startswith("copy.")}
    own = {key: value for key, value in state.items() if key not in copies}
    written = adapter.method.to_file(tuned.model, adapter, own)
    if written is None:
        return _by_layout(state, adapter.method, layout_of(tuned, adapter), tuned.sites)
    return written | {_copy_key(key, adapter.method): value for key, value in copies.items()}


def from_file(tensors: State, tuned: Tuned, name: str, *, theirs: bool) -> State:
    """Undo `to_file` for the adapter `name`; a key that is not its own is kept.

    Args:
        theirs: PEFT wrote the file, which may hold what we write otherwise.
    """
    adapter = tuned.adapter(name)
    if (state := _by_own_word(tensors, tuned, adapter)) is not None:
        return state
    layout = layout_of(tuned, adapter)
    if theirs:
        layout = adapter.method.traits.peft or type(adapter.method).traits.peft
    return _undo_layout(tensors, tuned.state(name), adapter.method, layout, tuned.sites)


def layout_of(tuned: Tuned, adapter: Adapter) -> PeftLayout | None:
    """PEFT's, where PEFT has the method on this model."""
    method, sites = adapter.method, tuned.sites
    layout = method.traits.peft
    if layout is None or not method.in_peft(tuned.model, adapter.shared):
        return None
    paths = [path_of(key) for key, graft in adapter.grafts.items() if list(graft.parameters())]
    return layout if all(peft_shapes.layout_at(layout, sites.get(path)) for path in paths) else None


def _by_own_word(tensors: State, tuned: Tuned, adapter: Adapter) -> State | None:
    """A state from a file of a method that has its own word on it, else None."""
    mine = [key for key in adapter.own_state() if key.startswith("copy.")]
    copies = {_copy_key(key, adapter.method): key for key in mine}
    rest = {key: value for key, value in tensors.items() if key not in copies}
    state = adapter.method.from_file(tuned.model, adapter, rest)
    if state is None:
        return None
    own = {key: value for key, value in state.items() if key not in mine}
    return own | {copies[key]: value for key, value in tensors.items() if key in copies}


def _by_layout(state: State, method: Method, layout: PeftLayout | None, sites: Mapping[str, Site]) -> State:
    if layout is None:
        return state
    out: State = {}
    for prefix, tensors in _grouped(state).items():
        if prefix.startswith("copy."):
            out |= {_copy_key(f"{prefix}{leaf}", method): value for leaf, value in tensors.items()}
            continue
        site = _site_of(prefix, sites)
        here = peft_shapes.layout_at(layout, site)
        for leaf, value in method.pack(tensors).items():
            out[_file_key(f"{prefix}{leaf}", here)] = peft_shapes.shaped(value, leaf, layout, site)
    return out


def _undo_layout(
    tensors: State, own: State, method: Method, layout: PeftLayout | None, sites: Mapping[str, Site]
) -> State:
    if layout is None:
        return tensors
    state: State = {}
    rest = dict(tensors)
    for prefix, mine in _grouped(own).items():
        if prefix.startswith("copy."):
            copies = {f"{prefix}{leaf}": _copy_key(f"{prefix}{leaf}", method) for leaf in mine}
            state |= {ours: rest.pop(key) for ours, key in copies.items() if key in rest}
            continue
        site = _site_of(prefix, sites)
        here = peft_shapes.layout_at(layout, site) or layout
        keys = {leaf: _file_key(f"{prefix}{leaf}", here) for leaf in here.tensors}
        found = {leaf: rest.pop(key) for leaf, key in keys.items() if key in rest}
        found = {leaf: peft_shapes.unshaped(value, leaf, layout, site) for leaf, value in found.items()}
        state |= {f"{prefix}{leaf}": value for leaf, value in method.unpack(found, mine).items()}
    return state | rest


def _grouped(state: State) -> dict[str, State]:
    """Tensors by own name, for each graft's part of a state's keys: `graft.PATH.`, `shared.`."""
    groups: dict[str, State] = {}
    for key, value in state.items():
        prefix, dot, leaf = key.rpartition(".")
        groups.setdefault(prefix + dot, {})[leaf] = value
    return groups


def _site_of(prefix: str, sites: Mapping[str, Site]) -> Site | None:
    """The site of a graft, from its part of a state's keys, `graft.PATH.`."""
    tree, _, path = prefix.removesuffix(".").partition(".")
    return sites.get(path) if tree == "graft" else None


def _file_key(key: str, layout: PeftLayout | None) -> str:
    """`graft.PATH.a` -> `base_model.model.PATH.lora_A.weight`, where PEFT has the method."""
    if layout is None:
        return key
    path, _, leaf = key.partition(".")[2].rpartition(".")
    if leaf not in layout.tensors:  # what PEFT computes from, and does not keep
        return key
    theirs = layout.tensors[leaf]
    return f"{PEFT_ROOT}{path}.{theirs}" if path else theirs


def _copy_key(key: str, method: Method) -> str:
    """PEFT's key of a module trained whole."""
    return _root(type(method)) + key.removeprefix("copy.")


def _root(method: type[Method]) -> str:
    """What stands before the path of a module in PEFT's files."""
    return PROMPT_ROOT if "tokens" in method.traits.seams else PEFT_ROOT


# -- configuration -----------------------------------------------------------------------------------------------


def config(tuned: Tuned, adapter: Adapter, base: str | None) -> dict[str, Any] | None:
    """PEFT's configuration of an adapter; None where PEFT does not have the method.

    Args:
        base: name of the model.
    """
    method, layout = adapter.method, layout_of(tuned, adapter)
    copies = [path_of(key) for key in adapter.copies]
    saved = {"modules_to_save": copies} if copies else {}
    if (own := method.file_config(adapter)) is not None:
        task = _task(tuned)
        if task in ("SEQ_CLS", "TOKEN_CLS") and not copies:  # PEFT would look for a trained head in the file
            task = None
        return own | {"base_model_name_or_path": base, "task_type": task} | saved
    if layout is None:
        return None
    said: dict[str, Any] = {"peft_type": layout.kind, "base_model_name_or_path": base, "inference_mode": True}
    if paths := [path_of(key) for key, graft in adapter.grafts.items() if list(graft.parameters())]:
        said["target_modules"] = paths
    fields = {theirs: getattr(method, ours) for ours, theirs in layout.fields.items()}
    extra = method.peft_extra(tuned.model) | {"task_type": _task(tuned)}
    return said | saved | fields | dict(layout.fixed) | dict(layout.marks) | extra


def recognise(
    config: Mapping[str, Any], methods: Iterable[type[Method]], where: Path, bridge: Bridge | None
) -> type[Method]:
    """The method that PEFT's configuration means.

    Args:
        methods: the classes that it may be of.
        where: the file that says so.
        bridge: as of `files.read`.

    Raises:
        AdapterError: none of them, or one with a setting that it does not know.
    """
    kind = config.get("peft_type")
    layouts = [(m, m.traits.peft) for m in methods if m.traits.peft and m.traits.peft.claims]
    same = [(m, p) for m, p in layouts if p.kind == kind]
    bridged = bridge(config, None) if bridge else None
    if not same:
        if bridged:
            return bridged
        known = ", ".join(sorted({p.kind for _, p in layouts})) or "none"
        raise AdapterError(f"{where}: peft_type {kind!r} is no method here; known: {known}")
    wrong = {method: _unfit(config, layout) for method, layout in same}
    method = min(wrong, key=lambda m: len(wrong[m]))
    if wrong[method]:
        if bridged:
            return bridged
        told = ", ".join(f"{k}={config.get(k)!r}" for k in wrong[method])
        raise AdapterError(f"{where}: {told} is not supported")
    return method


def understood(
    config: Mapping[str, Any], tensors: State, method: type[Method]
) -> tuple[dict[str, Any], tuple[str, ...], State]:
    """(settings of the method, paths of the modules trained whole, the adapter's own tensors) of PEFT's file.

    Targets are read off the tensors, since PEFT has several ways to write them.

    Raises:
        AdapterError: a setting that one of PEFT's own methods does not take here.
    """
    layout = method.traits.peft
    saved = config.get("modules_to_save") or ()
    if layout is None:  # one of PEFT's own methods, whose settings say all
        try:
            settings = method.from_peft(config)
        except SettingsError as error:
            raise AdapterError(f"HF PEFT's {config.get('peft_type')} adapter: {error}") from error
        return settings, _saved_modules([key.removeprefix(_root(method)) for key in tensors], saved), tensors
    settings = {ours: config[theirs] for ours, theirs in layout.fields.items() if theirs in config}
    settings |= method.from_peft(config)
    # beside an embedding's adapter PEFT saves the embedding itself, which is the base's
    tensors = {key: value for key, value in tensors.items() if ".base_layer." not in key}
    named = {key: _path(key, (*layout.tensors.values(), *layout.embedding.values())) for key in tensors}
    if paths := sorted({path for path in named.values() if path}):
        settings["targets"] = tuple(paths)
    rest = [key.removeprefix(_root(method)) for key, path in named.items() if path is None]
    return settings, _saved_modules(rest, saved), tensors


def _unfit(config: Mapping[str, Any], layout: PeftLayout) -> list[str]:
    """PEFT settings whose values are not this layout's; None, {} and False are one."""
    marks = [k for k, v in layout.marks.items() if config.get(k) != v]
    fixed = [k for k, v in layout.fixed.items() if config.get(k, v) != v and (config[k] or v)]
    allowed = [k for k, values in layout.allowed.items() if k in config and config[k] not in values]
    return [*marks, *fixed, *allowed]


def _path(key: str, endings: Iterable[str]) -> str | None:
    """The module that a key of PEFT's belongs to, '' for the whole model; None if it is no tensor of the method."""
    if key in endings:
        return ""
    inside = key.removeprefix(PEFT_ROOT)
    return next((inside.removesuffix(f".{end}") for end in endings if inside.endswith(f".{end}")), None)


def _saved_modules(keys: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that PEFT saved whole: `score` of `score.weight`, if it names `score`."""
    paths = {m.group(1) for key in keys for n in names if (m := re.match(rf"((?:.+\.)?{re.escape(n)})\.", key))}
    return tuple(sorted(paths))


def _task(tuned: Tuned) -> str | None:
    """PEFT's task type, from the class of the base."""
    words = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    words |= {"ForTokenClassification": "TOKEN_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    name = type(tuned.model).__name__
    return next((task for ending, task in words.items() if name.endswith(ending)), None)
