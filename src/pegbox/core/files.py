"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`.

Where HF PEFT has the method, both files are PEFT's own, key for key, so that PEFT and what reads its files load them,
and PEFT's files load here.  Other methods use the same two names with Pegbox's keys.  What PEFT has no place for (the
method's settings, a fingerprint of the base) is in the tensor file's header.  Files are written under a temporary name
and renamed; nothing is ever unpickled.  PEFT's half of this is in `pegbox.core.peft_files`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pegbox.core import peft_files
from pegbox.core.adapter import Adapter, State, path_of
from pegbox.core.errors import AdapterError, SettingsError, TargetError, did_you_mean
from pegbox.core.fingerprint import BaseDrift, BaseRecord, fingerprint
from pegbox.core.method import Method
from pegbox.core.settings import build
from pegbox.core.sharded import whole
from pegbox.core.tuned import Tuned

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
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

log = logging.getLogger("pegbox")


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
        record: of the base, so that it is known where it is kept in another way; None where the file has none.
    """

    method: str
    settings: dict[str, Any]
    also_train: tuple[str, ...]
    base: str | None
    fingerprint: str | None
    tensors: State
    extra: dict[str, Any]
    record: BaseRecord | None = None


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
    record = BaseRecord.of(tuned.model, without=copies) if adapter.method.traits.keeps_base else None
    header = {
        "format": FORMAT,
        "method": adapter.method.name(),
        "settings": asdict(adapter.method),
        "also_train": copies,
        "fingerprint": record and record.fingerprint,
        "base_record": record and record.to_json(),
        "base": _base_name(tuned),
        "extra": extra,
    }
    state = _state(tuned, adapter, name)
    state = {key: value.contiguous().cpu() for key, value in state.items()}
    if not writes:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / TENSORS, state, header)
    _write_text(folder / CONFIG, json.dumps(_config(tuned, adapter, header), indent=2, sort_keys=True))
    return folder


def read(
    directory: str | os.PathLike[str],
    methods: Iterable[type[Method]],
    *,
    bridge: peft_files.Bridge | None = None,
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
        return from_peft(config, tensors, known.values(), folder / CONFIG, bridge)
    if header["method"] not in known and not (bridge and bridge(config, header["method"])):
        raise AdapterError(
            f"{folder}: unknown method {header['method']!r}{did_you_mean(header['method'], known)}; one of your own is "
            "looked for in the folders that the variable PEGBOX_METHODS names"
        )
    said, mark = header.get("base_record"), header["fingerprint"]
    record = BaseRecord.from_json(said, mark) if said and mark else None
    return AdapterFile(tensors=tensors, record=record, **{key: header[key] for key in HEADER})


def put(file: AdapterFile, tuned: Tuned, method: type[Method], name: str = "default") -> Tuned:
    """Add a read adapter to a tuned model.

    A base that is the same and kept otherwise, quantised say, is told in a line of the log, and in the adapter's
    `base_drift`.

    Raises:
        AdapterError: the base is another one, or a setting, a target or a tensor does not fit it.
    """
    drift = _base_drift(file, tuned)
    before = tuned._plan
    try:
        built = build(method, file.settings, what=file.method)
        if drift is not None and built.traits.exact_base:
            raise AdapterError(f"{file.method} keeps a part of each adapter in the base alone, and {drift}")
        tuned.add(name, built, also_train=file.also_train)
    except (SettingsError, TargetError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}") from error
    try:
        fill(file, tuned, name)
    except AdapterError:
        tuned.remove(name, then=before)
        raise
    tuned.adapter(name).base_drift = drift
    if drift is not None:
        log.warning("%s", drift)
    return tuned


def _base_drift(file: AdapterFile, tuned: Tuned) -> BaseDrift | None:
    """How far the base is from that of the file, where it is the same one kept in another way.

    Raises:
        AdapterError: it is another one.
    """
    found = file.fingerprint and fingerprint(tuned.model, without=file.also_train)
    if file.fingerprint == found:
        return None
    told = (
        f"this adapter was trained on another base ({file.base or 'unnamed'}, fingerprint {file.fingerprint}); "
        f"this model is {_base_name(tuned) or 'unnamed'}, fingerprint {found}"
    )
    if file.record is None:
        raise AdapterError(f"{told}. The file does not say how its base was kept: if quantised, load that")
    try:
        return file.record.compare(tuned.model, without=file.also_train)
    except AdapterError as error:
        raise AdapterError(f"{told}: {error}") from error


def fill(file: AdapterFile, tuned: Tuned, name: str) -> None:
    """Copy a read adapter's tensors into an adapter that `tuned` has already.

    Raises:
        AdapterError: a tensor has no place or the wrong shape; nothing is changed.
    """
    theirs = file.fingerprint is None and not file.extra
    tuned.load_state(peft_files.from_file(file.tensors, tuned, name, theirs=theirs), name)


def from_peft(
    config: Mapping[str, Any],
    tensors: State,
    methods: Iterable[type[Method]],
    where: Path,
    bridge: peft_files.Bridge | None = None,
) -> AdapterFile:
    """An adapter in PEFT's terms: its configuration, and its tensors by PEFT's keys.

    Args:
        methods: the classes that it may be of.
        where: the file that the configuration comes from.
        bridge: as of `read`.

    Raises:
        AdapterError: a setting that no method here means.
    """
    method = peft_files.recognise(config, methods, where, bridge)
    settings, also_train, tensors = peft_files.understood(config, tensors, method)
    return AdapterFile(
        method=method.name(),
        settings=settings,
        also_train=also_train,
        base=config.get("base_model_name_or_path"),
        fingerprint=None,
        tensors=tensors,
        extra={},
    )


def as_peft(tuned: Tuned, name: str | None = None) -> tuple[dict[str, Any], State]:
    """An adapter in PEFT's terms; both parts are empty where PEFT does not have the method."""
    adapter = tuned.adapter(name)
    config = peft_files.config(tuned, adapter, _base_name(tuned))
    if config is None or peft_files.layout_of(tuned, adapter) is None:
        return {}, {}
    return config, _state(tuned, adapter, name)


def _state(tuned: Tuned, adapter: Adapter, name: str | None) -> State:
    """An adapter's tensors as its file has them."""
    return peft_files.to_file(tuned, adapter, {key: whole(value) for key, value in tuned.state(name).items()})


def _config(tuned: Tuned, adapter: Adapter, header: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration, where PEFT has the method, else ours."""
    theirs = peft_files.config(tuned, adapter, header["base"])
    if theirs is not None:
        return theirs
    ours = {k: header[k] for k in ("method", "settings", "also_train", "fingerprint")}
    return {"pegbox": ours, "base_model_name_or_path": header["base"]}


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
