"""Adapters on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, bits, every, require_equal, require_raises, require_untouched
from pegbox.checks.when import keeps_base
from pegbox.core.errors import AdapterError
from pegbox.core.files import CONFIG, TENSORS


@check(on="all")
def a_file_holds_all(lab: Lab) -> None:
    """Saved, and loaded on a fresh base under other seeds, the adapter has the same bits and outputs."""
    tuned = lab.shaken()
    folder = lab.save(tuned)
    torch.manual_seed(99)
    other = lab.load(folder, lab.model())
    require(other.method == tuned.method, f"{tuned.method!r} came back as {other.method!r}")
    every(other.state(), tuned.state(), require_equal, "the loaded state")
    require_equal(lab.output(other), lab.output(tuned), "the loaded adapter")
    require(other.trainable().keys() == tuned.trainable().keys(), "other parameters train after loading")


@check()
def drawn_values_are_in_the_file(lab: Lab) -> None:
    """What a build drew from its seed is part of the file, not drawn again."""
    tuned = lab.tuned(seed=7)
    other = lab.load(lab.save(tuned), lab.model())
    require_equal(lab.output(other), lab.output(tuned), "an adapter built from seed 7, loaded")
    every(dict(other.named_buffers()), dict(tuned.named_buffers()), require_equal, "buffers")


@check()
def damaged_files_are_refused(lab: Lab) -> None:
    """A truncated, altered, foreign or incomplete file is an AdapterError, and the model stays as it was."""
    folder = lab.save(lab.shaken())
    whole = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    for what, damage in _damages():
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        damage(folder)
        model = lab.model()
        before = bits(model)
        with require_raises(AdapterError, what):
            lab.load(folder, model)
        require_untouched(model, before, f"after {what}")


def _damages() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    yield "no tensors", lambda f: (f / TENSORS).unlink()
    yield "no configuration", lambda f: (f / CONFIG).unlink()
    yield "half of the tensors' file", lambda f: _cut(f / TENSORS, 0.5)
    yield "a few bytes of the tensors' file", lambda f: _cut(f / TENSORS, 0.01)
    yield "an empty tensors' file", lambda f: (f / TENSORS).write_bytes(b"")
    yield "half of the configuration", lambda f: _cut(f / CONFIG, 0.5)
    yield "a configuration that is a list", lambda f: (f / CONFIG).write_text("[1, 2]")
    yield "a configuration of bytes", lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x80")
    yield "a tensor too few", lambda f: _rewrite(f, lambda t: t.pop(sorted(t)[0]))
    yield "a tensor too many", lambda f: _rewrite(f, lambda t: t.update(nonsense=torch.zeros(1)))
    yield "a tensor of another shape", lambda f: _rewrite(f, _reshape)
    yield "a value that is not a number", lambda f: _rewrite(f, _spoil)
    yield "a header that is not JSON", lambda f: _rewrite(f, header="{")
    yield "a header without a method", lambda f: _rewrite(f, header="{}")
    yield "a header of another type", lambda f: _rewrite(f, header="[]")
    yield "a method that is not known", lambda f: _rewrite(f, edit={"method": "no_such_method"})
    yield "a file named as the method", lambda f: _rewrite(f, edit={"method": "evil.py"})
    yield "a setting that is not known", lambda f: _rewrite(f, edit={"settings": {"no_such_setting": 1}})
    yield "settings of another type", lambda f: _rewrite(f, edit={"settings": 3})
    yield "targets that are not there", lambda f: _rewrite(f, edit={"settings": {"targets": "no_such_layer"}})
    yield "no header, and a strange configuration", _foreign


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _rewrite(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    *,
    header: str | None = None,
    edit: dict[str, Any] | None = None,
) -> None:
    """The tensors' file again, with something changed."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    if change:
        change(tensors)
    if header is not None:
        metadata["pegbox"] = header
    if edit:
        metadata["pegbox"] = json.dumps(json.loads(metadata["pegbox"]) | edit)
    save_file(tensors, folder / TENSORS, metadata=metadata)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key] = torch.zeros(*tensors[key].shape, 2)


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    key = next(k for k in sorted(tensors) if tensors[k].is_floating_point())
    tensors[key].view(-1)[0] = float("nan")


def _foreign(folder: Path) -> None:
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text('{"peft_type": "NO_SUCH_TUNER"}')


@check(keeps_base)
def another_base_is_refused(lab: Lab) -> None:
    """An adapter loaded on a base with other values is an AdapterError, and the model stays as it was."""
    folder = lab.save(lab.shaken())
    model = lab.model(seed=5)
    before = bits(model)
    with require_raises(AdapterError, "another base", "base"):
        lab.load(folder, model)
    require_untouched(model, before, "after a refused adapter")
