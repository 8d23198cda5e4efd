"""Every verb's help, and the verbs that need no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pegbox.cli.app import SETTINGS_VERBS
from pegbox.cli.data import VERB as DATA_CHECK
from pegbox.cli.lint import check_command
from pegbox.cli.verb import _part
from pegbox.core.errors import SettingsError

from .conftest import Ran

VERBS = [module.VERB for module in SETTINGS_VERBS] + [DATA_CHECK]


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.name)
def test_help_shows_every_setting_once(verb: object, pegbox: Callable[..., Ran]) -> None:
    ran = pegbox(*verb.name.split(), "--help")
    assert ran.code == 0
    fields = [f for f in dataclasses.fields(verb._class()) if f.name not in verb.hidden]
    for f in fields:
        shown = f"\n  {f.name}=" if _part(verb._class(), f.name) is None else f"\n{f.name}: "
        assert ran.out.count(shown) == 1, f.name
    assert not any(f"\n  {name}=" in ran.out for name in verb.hidden)


def test_root_help_lists_the_verbs(pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("--help")
    assert ran.code == 0
    for name in ("demo", "methods", "check", "data", "doctor", *(v.name for v in VERBS[:-1])):
        assert f"  {name} " in ran.out
    assert "infer" not in ran.out


def test_version(pegbox: Callable[..., Ran]) -> None:
    assert pegbox("--version").out.startswith("pegbox 0")


def test_methods_as_json(pegbox: Callable[..., Ran]) -> None:
    entries = {entry["name"]: entry for entry in json.loads(pegbox("methods", "--json").out)}
    lora = entries["lora"]
    assert lora["arxiv"] == "2106.09685"
    assert lora["seams"] == ["weight", "update"]
    assert lora["settings"]["properties"]["rank"]["minimum"] == 1
    assert lora["docs"] == "methods/lora.md"
    assert lora["traits"]["merge"] == "exact"
    assert json.loads(pegbox("methods", "lora", "--json").out) == lora


def test_methods_for_people(pegbox: Callable[..., Ran]) -> None:
    table = pegbox("methods").out
    assert "2106.09685" in table
    assert all(len(line) <= 120 for line in table.splitlines())
    assert "rank = 16" in pegbox("methods", "lora").out


def test_aliases_of_verbs_and_settings() -> None:
    check_command(["sft", "model_name_or_path=x", "dataset=y", "finetuning_type=lora", "lora_r=8", "cutoff_len=64"])
    check_command(["infer", "model=x", "prompt=hello"])
    check_command(["evaluate", "adapter=x", "data=y"])


def test_lint_takes_what_the_commands_take() -> None:
    check_command(["data", "check", "data=x", "model=y"])
    check_command(["train", "recipe.yaml", "epochs=2"])
    check_command(["compare", "--help"])
    check_command(["check", "my_method.py", "--only", "merge"])
    for wrong in (["trian"], ["train", "modle=x"], ["data", "chek"], ["methods", "--jsn"], ["train", "epochs=2"]):
        with pytest.raises(SettingsError):
            check_command(wrong)


def test_check_of_a_file(pegbox: Callable[..., Ran], tmp_path: Path) -> None:
    from pegbox.methods import bitfit

    file = tmp_path / "my_method.py"
    file.write_text(Path(bitfit.__file__).read_text())
    ran = pegbox("check", str(file), "--only", "starts_as_declared,size_is_its_formula")
    assert ran.code == 0
    assert "my_method" in ran.out


def test_doctor(pegbox: Callable[..., Ran]) -> None:
    ran = pegbox("doctor")
    assert ran.code == 0
    assert "torch" in ran.out


def test_data_check(pegbox: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {k}", "label": "ab"[k % 2]}) + "\n" for k in range(8)))
    ran = pegbox("data", "check", f"data={file}")
    assert ran.code == 0
    assert "8" in ran.out
    report = json.loads(pegbox("data", "check", f"data={file}", "json=true").out)
    assert report["labels"] == {"a": 4, "b": 4}
