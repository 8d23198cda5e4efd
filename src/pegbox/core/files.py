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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pegbox.core.adapter import Adapter, State, path_of
from pegbox.core.errors import AdapterError, SettingsError, TargetError, did_you_mean
from pegbox.core.fingerprint import fingerprint
from pegbox.core.method import Method, PeftLayout
from pegbox.core.settings import build
from pegbox.core.sharded import whole
from pegbox.core.tuned import Tuned

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_ROOT = "base_model.model."
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
        "format": 1,
        "method": adapter.method.name(),
        "settings": asdict(adapter.method),
        "also_train": copies,
        "fingerprint": fingerprint(tuned.model, without=copies) if adapter.method.traits.keeps_base else None,
        "base": _base_name(tuned),
        "extra": extra,
    }
    layout = adapter.method.traits.peft
    state = {_file_key(key, layout): whole(value).contiguous().cpu() for key, value in tuned.state(name).items()}
    if not writes:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / TENSORS, state, header)
    _write_text(folder / CONFIG, json.dumps(_config(tuned, adapter, copies, header), indent=2, sort_keys=True))
    return folder


def read(directory: str | os.PathLike[str], methods: Iterable[type[Method]]) -> AdapterFile:
    """Read an adapter folder written by Pegbox or by HF PEFT.

    Args:
        methods: the classes that the file may be of.

    Raises:
        AdapterError: a missing, truncated, altered or foreign file, or a PEFT setting that no method here means.
    """
    folder, known = Path(directory), {m.name(): m for m in methods}
    config = _read_config(folder)
    header, tensors = _read_tensors(folder / TENSORS)
    if header is None:
        return _from_peft(config, _recognise(config, known.values(), folder), tensors)
    if header["method"] not in known:
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
    layout = tuned.adapter(name).method.traits.peft
    keys = {_file_key(key, layout): key for key in tuned.state(name)}
    tuned.load_state({keys.get(k, k): v for k, v in file.tensors.items()}, name)


# -- keys and PEFT's configuration -------------------------------------------------------------------------------


def _file_key(key: str, layout: PeftLayout | None) -> str:
    """`graft.PATH.a` -> `base_model.model.PATH.lora_A.weight`, where PEFT has the method."""
    if layout is None:
        return key
    tree, _, rest = key.partition(".")
    if tree == "copy":
        return PEFT_ROOT + rest
    path, _, leaf = rest.rpartition(".")
    theirs = layout.tensors[leaf]
    return f"{PEFT_ROOT}{path}.{theirs}" if path else theirs


def _config(tuned: Tuned, adapter: Adapter, copies: list[str], header: Mapping[str, Any]) -> dict[str, Any]:
    method, layout = adapter.method, adapter.method.traits.peft
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


def _recognise(config: Mapping[str, Any], methods: Iterable[type[Method]], folder: Path) -> type[Method]:
    kind = config.get("peft_type")
    layouts = [(m, m.traits.peft) for m in methods if m.traits.peft]
    same = [(m, p) for m, p in layouts if p.kind == kind]
    if not same:
        known = ", ".join(sorted({p.kind for _, p in layouts})) or "none"
        raise AdapterError(f"{folder / CONFIG}: peft_type {kind!r} is no method here; known: {known}")
    wrong = {method: _unfit(config, layout) for method, layout in same}
    method = min(wrong, key=lambda m: len(wrong[m]))
    if wrong[method]:
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
    assert layout is not None
    settings = {ours: config[theirs] for ours, theirs in layout.fields.items() if theirs in config}
    settings |= method.from_peft(config)
    named = {key: _peft_path(key, layout.tensors.values()) for key in tensors}
    if paths := sorted({path for path in named.values() if path}):
        settings["targets"] = tuple(paths)
    rest = [key.removeprefix(PEFT_ROOT) for key, path in named.items() if path is None]
    return AdapterFile(
        method=method.name(),
        settings=settings,
        also_train=_saved_modules(rest, config.get("modules_to_save") or ()),
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
        raise AdapterError(f"{folder} holds no adapter: there is no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Any] | None, State]:
    """The header, None where Pegbox wrote none, and the tensors."""
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no {TENSORS}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    if any(not torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise AdapterError(f"{path} holds values that are not finite")
    return _read_header(path, metadata["pegbox"]) if "pegbox" in metadata else None, tensors


def _read_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path} has a damaged header: {error}") from error
    wrong = [k for k, kinds in HEADER.items() if not isinstance(header, dict) or not isinstance(header.get(k), kinds)]
    if wrong:
        raise AdapterError(f"{path} has a header of another form: {', '.join(wrong)} are missing or of another type")
    return header | {"also_train": tuple(header["also_train"])}
