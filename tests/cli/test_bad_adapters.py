"""Adapters that cannot be used, through the command line: one line that says why, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pegbox as library
from pegbox.checks.models import FAMILIES
from pegbox.core.files import CONFIG, TENSORS

from .conftest import Ran


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, seed in (("one", 0), ("other", 5)):
        torch.manual_seed(seed)
        FAMILIES["llama"].build().save_pretrained(folder / name)
    return folder


@pytest.fixture
def adapter(bases: Path, tmp_path: Path) -> Path:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(bases / "one")
    library.tune(model, "lora", rank=4).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def _truncate(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def _pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / TENSORS)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "damaged"),
    "pickled": (_pickle, "none is read"),
    "configuration is broken": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "configuration is gone": (lambda f: (f / CONFIG).unlink(), "holds no adapter"),
    "a tensor is gone": (_without_a_tensor, "missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("verb", ["merge", "inspect", "generate"])
def test_damage(name: str, verb: str, adapter: Path, bases: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    damage, told = DAMAGES[name]
    damage(adapter)
    words = {
        "merge": [f"adapter={adapter}", f"model={bases / 'one'}", f"output={tmp_path / 'out'}"],
        "inspect": [f"adapter={adapter}"],
        "generate": [f"adapter={adapter}", f"model={bases / 'one'}", "prompt=x"],
    }[verb]
    ran = pegbox(verb, *words)
    if verb == "inspect" and name == "a tensor is gone":  # it looks at the file alone
        assert ran.code == 0
        return
    _assert_one_line(ran, told)
    assert not (tmp_path / "out").exists()


def test_another_base(adapter: Path, bases: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("merge", f"adapter={adapter}", f"model={bases / 'other'}", f"output={tmp_path / 'out'}")
    _assert_one_line(ran, "another base")
    assert not (tmp_path / "out").exists()


def test_a_pickle_as_adapter(bases: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    torch.save({}, tmp_path / "model.bin")
    ran = pegbox("merge", f"adapter={tmp_path / 'model.bin'}", f"model={bases / 'one'}", f"output={tmp_path / 'out'}")
    _assert_one_line(ran, "is a file")


def test_a_whole_model_as_adapter(bases: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("merge", f"adapter={bases / 'one'}", f"output={tmp_path / 'out'}")
    _assert_one_line(ran, "holds a whole model")


def test_a_newer_adapter(adapter: Path, bases: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    from safetensors import safe_open

    with safe_open(adapter / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["pegbox"]) | {"format": 2}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, adapter / TENSORS, metadata={"pegbox": json.dumps(header)})
    ran = pegbox("merge", f"adapter={adapter}", f"model={bases / 'one'}", f"output={tmp_path / 'out'}")
    _assert_one_line(ran, "newer")


def _assert_one_line(ran: Ran, told: str) -> None:
    assert ran.code == 2, ran
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.err
    assert told in errors[0]
    assert "Traceback" not in ran.err
