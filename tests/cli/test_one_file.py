"""A method more is one file: the example of docs/add-a-method.md, in a folder, is listed, checked, trained, merged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pegbox import methods
from train.tiny import chat_file, model_folder

from .conftest import Ran

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
NAME = "output_scale"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the file, which the registry looks in."""
    blocks = re.findall(r'^```python\n(""".*?)^```', PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    place = tmp_path / "mine"
    place.mkdir()
    (place / f"{NAME}.py").write_text(blocks[0])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(place)])
    methods.catalogue.cache_clear()
    yield place
    methods.catalogue.cache_clear()
    sys.modules.pop(f"{methods.__name__}.{NAME}", None)


def test_one_file_is_a_method(folder: Path, pegbox: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    model_folder(Path("llama"))
    chat_file(Path("chat.jsonl"))
    assert NAME in pegbox("methods").out
    assert "diag(l) W" in pegbox("methods", NAME).out
    checks = "size_is_its_formula,a_file_holds_all"
    checked = pegbox("check", NAME, "--only", checks)
    assert checked.code == 0, checked.out
    trained = pegbox("train", "model=llama", "data=chat.jsonl", f"method={NAME}", "output=out", "max_steps=1")
    assert trained.code == 0, trained.err
    assert json.loads(Path("out/adapter_config.json").read_text())["pegbox"]["method"] == NAME
    merged = pegbox("merge", "out", "output=merged")
    assert merged.code == 0, merged.err


def test_the_environment_names_folders(folder: Path) -> None:
    code = "from pegbox import methods; print(*methods.names())"
    where = {**os.environ, "PEGBOX_METHODS": str(folder)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where, check=True)
    assert NAME in ran.stdout.split()


def test_a_file_that_cannot_run(tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    file = tmp_path / "json.py"
    file.write_text("from pegbox.core import Methood\n")
    ran = pegbox("check", str(file))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "json.py cannot be run: ImportError: cannot import name 'Methood'" in ran.err
    assert json.loads("1") == 1  # the file has not taken the place of a module of its name
    assert sys.modules["json"] is json
