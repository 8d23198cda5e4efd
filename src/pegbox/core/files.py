"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`.

Where HF PEFT has the method, both files are PEFT's own, key for key, so that PEFT and what reads its files load them,
and PEFT's files load here.  Other methods use the same two names with Pegbox's keys.  What PEFT has no place for (the
method's settings, a fingerprint of the base) is in the tensor file's header.  Files are written under a temporary name
and renamed; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pegbox.core import peft_shapes
from pegbox.core.adapter import Adapter, State, path_of
from pegbox.core.errors import AdapterError, SettingsError, TargetError, did_you_mean
from pegbox.core.fingerprint import fingerprint
from pegbox.core.method import Method, PeftLayout
from pegbox.core.settings import build
from pegbox.core.sharded import whole
from pegbox.core.site import Site
from pegbox.core.tuned import Tuned

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_ROOT = "base_model.model."
PROMPT_ROOT = "base_model."  # the same in the file of a prompt, where PEFT puts nothing around the model
Bridge = Callable[[Mapping[str, Any], str | None], "type[Method] | None"]
UNPICKLED = (
    "a pickle can run code, so none is read: load it where you trust it and save it again with safe_serialization=True"
)
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FORMAT = 1  # of the header; a later one may mean what this code does not know
HEADER: dict[str, tuple[type, ...]] = {  # what Pegbox writes, and its types
    "method": (str,),
    "settings": (dict,),
    "also_train": (list,),
    "base": (str, type(None)),
    "fingerprint": (str, type(None)),
    "extra": (dict,),
}


@dataclass(frozen=True)
class AdapterFile:
    """What a folder holds, before it is put on a model.

    Attributes:
        method: name of the method.
        settings: of the method, as plain values.
        also_train: paths of the modules trained whole.
        base: name or path of the base, as the run knew it.
        fingerprint: of the base; None where the file does not say.
        tensors: by key of the file.
        extra: what the saver added (labels, task).
    """

    method: str
    settings: dict[str, Any]
    also_train: tuple[str, ...]
    base: str | None
    fingerprint: str | None
    tensors: State
    extra: dict[str, Any]


def save(
    tuned: Tuned, directory: str | os.PathLike[str], name: str | None = None, *, writes: bool = True, **extra: Any
) -> Path:
    """Write an adapter; an interrupted write leaves what was there before.

    Args:
        writes: of a model that is sharded over processes all call this, and one writes.
        extra: plain values kept in the header and given back by `read`.
    """
    folder = Path(directory)
    adapter = tuned.adapter(name)
    copies = [path_of(key) for key in adapter.copies]
    header = {
        "format": FORMAT,
        "method": adapter.method.name(),
        "settings": asdict(adapter.method),
        "also_train": copies,
        "fingerprint": fingerprint(tuned.model, without=copies) if adapter.method.traits.keeps_base else None,
        "base": _base_name(tuned),
        "extra": extra,
    }
    state = _written(tuned, adapter, {key: whole(value) for key, value in tuned.state(name).items()})
    state = {key: value.contiguous().cpu() for key, value in state.items()}
    if not writes:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / TENSORS, state, header)
    _write_text(folder / CONFIG, json.dumps(_config(tuned, adapter, copies, header), indent=2, sort_keys=True))
    return folder


def read(
    directory: str | os.PathLike[str],
    methods: Iterable[type[Method]],
    *,
    bridge: Bridge | None = None,
) -> AdapterFile:
    """Read an adapter folder written by Pegbox or by HF PEFT.

    Args:
        methods: the classes that the file may be of.
        bridge: gives a class for a file that none of `methods` means, from its configuration and the name of its
            method, if the file says one; None if there is no such class either.

    Raises:
        AdapterError: a missing, truncated, altered or foreign file, or a PEFT setting that no method here means.
    """
    folder, known = Path(directory), {m.name(): m for m in methods}
    config = _read_config(folder)
    header, tensors = _read_tensors(folder / TENSORS)
    if header is None:
        return _from_peft(config, _recognise(config, known.values(), folder, bridge), tensors)
    if header["method"] not in known and not (bridge and bridge(config, header["method"])):
        raise AdapterError(f"{folder}: unknown method {header['method']!r}{did_you_mean(header['method'], known)}")
    return AdapterFile(tensors=tensors, **{key: header[key] for key in HEADER})


def put(file: AdapterFile, tuned: Tuned, method: type[Method], name: str = "default") -> Tuned:
    """Add a read adapter to a tuned model.

    Raises:
        AdapterError: the base is another one, or a setting, a target or a tensor does not fit it.
    """
    found = file.fingerprint and fingerprint(tuned.model, without=file.also_train)
    if file.fingerprint != found:
        raise AdapterError(
            f"this adapter was trained on another base ({file.base or 'unnamed'}, fingerprint {file.fingerprint}); "
            f"this model is {_base_name(tuned) or 'unnamed'}, fingerprint {found}"
        )
    before = tuned._plan
    try:
        built = build(method, file.settings, what=file.method)
        tuned.add(name, built, also_train=file.also_train)
    except (SettingsError, TargetError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}") from error
    try:
        fill(file, tuned, name)
    except AdapterError:
        tuned.remove(name, then=before)
        raise
    return tuned


def fill(file: AdapterFile, tuned: Tuned, name: str) -> None:
    """Copy a read adapter's tensors into an adapter that `tuned` has already.

    Raises:
        AdapterError: a tensor has no place or the wrong shape; nothing is changed.
    """
    adapter = tuned.adapter(name)
    if (state := _own_from_file(file.tensors, tuned, adapter)) is not None:
        tuned.load_state(state, name)
        return
    theirs = file.fingerprint is None and not file.extra  # a file of PEFT's may hold what we write otherwise
    layout = _layout(tuned, adapter)
    if theirs:
        layout = adapter.method.traits.peft or type(adapter.method).traits.peft
    tuned.load_state(from_file(file.tensors, tuned.state(name), adapter.method, layout, tuned.sites), name)


def from_peft(config: Mapping[str, Any], tensors: State, methods: Iterable[type[Method]], where: Path) -> AdapterFile:
    """An adapter in PEFT's terms, its configuration and its tensors by PEFT's keys, that some other file held.

    Raises:
        AdapterError: a setting that no method here means.
    """
    return _from_peft(config, _recognise(config, methods, where, None), tensors)


def as_peft(tuned: Tuned, name: str | None = None) -> tuple[dict[str, Any], State]:
    """An adapter in PEFT's terms; both parts are empty where PEFT does not have the method."""
    adapter = tuned.adapter(name)
    if _layout(tuned, adapter) is None:
        return {}, {}
    state = _written(tuned, adapter, {key: whole(value) for key, value in tuned.state(name).items()})
    return _config(tuned, adapter, [path_of(key) for key in adapter.copies], {"base": _base_name(tuned)}), state


# -- keys and PEFT's configuration -------------------------------------------------------------------------------


def _layout(tuned: Tuned, adapter: Adapter) -> PeftLayout | None:
    """PEFT's, where PEFT has the method on this model."""
    method, sites = adapter.method, tuned.sites
    layout = method.traits.peft
    if layout is None or not method.in_peft(tuned.model, adapter.shared):
        return None
    paths = [path_of(key) for key, graft in adapter.grafts.items() if list(graft.parameters())]
    return layout if all(peft_shapes.layout_at(layout, sites.get(path)) for path in paths) else None


def _written(tuned: Tuned, adapter: Adapter, state: State) -> State:
    """A state as the file has it: by the method's own word, or by `to_file`."""
    copies = {key: value for key, value in state.items() if key.startswith("copy.")}
    own = {key: value for key, value in state.items() if key not in copies}
    written = adapter.method.to_file(tuned.model, adapter, own)
    if written is None:
        return to_file(state, adapter.method, _layout(tuned, adapter), tuned.sites)
    return written | {_copy_key(key, adapter.method): value for key, value in copies.items()}


def _own_from_file(tensors: State, tuned: Tuned, adapter: Adapter) -> State | None:
    """A state from a file of a method that has its own word on it, else None."""
    mine = [key for key in adapter.own_state() if key.startswith("copy.")]
    copies = {_copy_key(key, adapter.method): key for key in mine}
    rest = {key: value for key, value in tensors.items() if key not in copies}
    state = adapter.method.from_file(tuned.model, adapter, rest)
    if state is None:
        return None
    own = {key: value for key, value in state.items() if key not in mine}
    return own | {copies[key]: value for key, value in tensors.items() if key in copies}


def _copy_key(key: str, method: Method) -> str:
    """PEFT's key of a module trained whole."""
    return _root(type(method)) + key.removeprefix("copy.")


def _root(method: type[Method]) -> str:
    """What stands before the path of a module in PEFT's files."""
    return PROMPT_ROOT if "tokens" in method.traits.seams else PEFT_ROOT


def to_file(state: State, method: Method, layout: PeftLayout | None, sites: Mapping[str, Site]) -> State:
    """A state as the file has it: in PEFT's keys and shapes, where there is a layout."""
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


def _site_of(prefix: str, sites: Mapping[str, Site]) -> Site | None:
    """The site of a graft, from its part of a state's keys, `graft.PATH.`."""
    tree, _, path = prefix.removesuffix(".").partition(".")
    return sites.get(path) if tree == "graft" else None


def from_file(
    tensors: State, own: State, method: Method, layout: PeftLayout | None, sites: Mapping[str, Site]
) -> State:
    """Undo `to_file`, for an adapter whose state is `own`; a key that is not its own is kept."""
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


def _file_key(key: str, layout: PeftLayout | None) -> str:
    """`graft.PATH.a` -> `base_model.model.PATH.lora_A.weight`, where PEFT has the method."""
    if layout is None:
        return key
    path, _, leaf = key.partition(".")[2].rpartition(".")
    if leaf not in layout.tensors:  # what PEFT computes from, and does not keep
        return key
    theirs = layout.tensors[leaf]
    return f"{PEFT_ROOT}{path}.{theirs}" if path else theirs


def _config(tuned: Tuned, adapter: Adapter, copies: list[str], header: Mapping[str, Any]) -> dict[str, Any]:
    method, layout = adapter.method, _layout(tuned, adapter)
    if (own := method.file_config(adapter)) is not None:
        task = _task(tuned)
        if task in ("SEQ_CLS", "TOKEN_CLS") and not copies:  # PEFT would look for a trained head in the file
            task = None
        said = {"base_model_name_or_path": header["base"], "task_type": task}
        return own | said | ({"modules_to_save": copies} if copies else {})
    if layout is None:
        return {"pegbox": {k: header[k] for k in ("method", "settings", "also_train", "fingerprint")}} | {
            "base_model_name_or_path": header["base"]
        }
    config = {"peft_type": layout.kind, "base_model_name_or_path": header["base"], "inference_mode": True}
    if paths := [path_of(key) for key, graft in adapter.grafts.items() if list(graft.parameters())]:
        config["target_modules"] = paths
    if copies:
        config["modules_to_save"] = copies
    fields = {theirs: getattr(method, ours) for ours, theirs in layout.fields.items()}
    extra = method.peft_extra(tuned.model) | {"task_type": _task(tuned)}
    return config | fields | dict(layout.fixed) | dict(layout.marks) | extra


def _recognise(
    config: Mapping[str, Any], methods: Iterable[type[Method]], folder: Path, bridge: Bridge | None
) -> type[Method]:
    kind = config.get("peft_type")
    layouts = [(m, m.traits.peft) for m in methods if m.traits.peft]
    same = [(m, p) for m, p in layouts if p.kind == kind]
    bridged = bridge(config, None) if bridge else None
    if not same:
        if bridged:
            return bridged
        known = ", ".join(sorted({p.kind for _, p in layouts})) or "none"
        raise AdapterError(f"{folder / CONFIG}: peft_type {kind!r} is no method here; known: {known}")
    wrong = {method: _unfit(config, layout) for method, layout in same}
    method = min(wrong, key=lambda m: len(wrong[m]))
    if wrong[method]:
        if bridged:
            return bridged
        told = ", ".join(f"{k}={config.get(k)!r}" for k in wrong[method])
        raise AdapterError(f"{folder / CONFIG}: {told} is not supported")
    return method


def _unfit(config: Mapping[str, Any], layout: PeftLayout) -> list[str]:
    """PEFT settings whose values are not this layout's; None, {} and False are one."""
    marks = [k for k, v in layout.marks.items() if config.get(k) != v]
    fixed = [k for k, v in layout.fixed.items() if config.get(k, v) != v and (config[k] or v)]
    allowed = [k for k, values in layout.allowed.items() if k in config and config[k] not in values]
    return [*marks, *fixed, *allowed]


def _from_peft(config: Mapping[str, Any], method: type[Method], tensors: State) -> AdapterFile:
    """PEFT's file as ours.  Targets are read off the tensors, since PEFT has several ways to write them."""
    layout = method.traits.peft
    if layout is None:
        return _bridged(config, method, tensors)
    settings = {ours: config[theirs] for ours, theirs in layout.fields.items() if theirs in config}
    settings |= method.from_peft(config)
    # beside an embedding's adapter PEFT saves the embedding itself, which is the base's
    tensors = {key: value for key, value in tensors.items() if ".base_layer." not in key}
    named = {key: _peft_path(key, (*layout.tensors.values(), *layout.embedding.values())) for key in tensors}
    if paths := sorted({path for path in named.values() if path}):
        settings["targets"] = tuple(paths)
    rest = [key.removeprefix(_root(method)) for key, path in named.items() if path is None]
    return AdapterFile(
        method=method.name(),
        settings=settings,
        also_train=_saved_modules(rest, config.get("modules_to_save") or ()),
        base=config.get("base_model_name_or_path"),
        fingerprint=None,
        tensors=tensors,
        extra={},
    )


def _bridged(config: Mapping[str, Any], method: type[Method], tensors: State) -> AdapterFile:
    """PEFT's file of one of PEFT's own methods."""
    try:
        settings = method.from_peft(config)
    except SettingsError as error:
        raise AdapterError(f"HF PEFT's {config.get('peft_type')} adapter: {error}") from error
    keys = [key.removeprefix(_root(method)) for key in tensors]
    return AdapterFile(
        method=method.name(),
        settings=settings,
        also_train=_saved_modules(keys, config.get("modules_to_save") or ()),
        base=config.get("base_model_name_or_path"),
        fingerprint=None,
        tensors=tensors,
        extra={},
    )


def _peft_path(key: str, endings: Iterable[str]) -> str | None:
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


def _base_name(tuned: Tuned) -> str | None:
    return getattr(getattr(tuned.model, "config", None), "name_or_path", None) or None


# -- bytes -------------------------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    part = path.with_suffix(".partial")
    save_file(dict(tensors), part, metadata={"format": "pt", "pegbox": json.dumps(header)})
    os.replace(part, path)


def _write_text(path: Path, text: str) -> None:
    part = path.with_suffix(".partial")
    part.write_text(text + "\n")
    os.replace(part, path)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(_no_adapter(folder))
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _no_adapter(folder: Path) -> str:
    """Why a place holds no adapter, and what it holds instead."""
    if folder.is_file():
        return f"{folder} is a file, and an adapter is a folder with {CONFIG} and {TENSORS}; {UNPICKLED}"
    if not folder.exists():
        return f"{folder} holds no adapter: there is no such folder"
    whole_model = any((folder / name).is_file() for name in WHOLE)
    told = f"{folder} holds no adapter: there is no {CONFIG}"
    return f"{told}; it holds a whole model, which goes to model=" if whole_model else told


def _read_tensors(path: Path) -> tuple[dict[str, Any] | None, State]:
    """The header, None where Pegbox wrote none, and the tensors."""
    metadata, tensors = read_tensors(path)
    return _read_header(path, metadata["pegbox"]) if "pegbox" in metadata else None, tensors


def read_tensors(path: Path) -> tuple[dict[str, str], State]:
    """What a safetensors file says of itself, and its tensors.

    Raises:
        AdapterError: it is missing or damaged, or holds what is not finite.
    """
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        hint = f", only {path.stem}.bin; {UNPICKLED}" if pickled else ""
        raise AdapterError(f"{path.parent} holds no {TENSORS}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    if any(not torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise AdapterError(f"{path} holds values that are not finite")
    return metadata, tensors


def _read_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path} has a damaged header: {error}") from error
    if isinstance(header, dict) and header.get("format", FORMAT) != FORMAT:
        raise AdapterError(
            f"{path} is of format {header['format']}, and this Pegbox reads {FORMAT}: it was written by a newer one; "
            "pip install -U pegbox"
        )
    wrong = [k for k, kinds in HEADER.items() if not isinstance(header, dict) or not isinstance(header.get(k), kinds)]
    if wrong:
        raise AdapterError(f"{path} has a header of another form: {', '.join(wrong)} are missing or of another type")
    return header | {"also_train": tuple(header["also_train"])}
