"""Named settings of methods: declared as data, found by name, overridden by what is given beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pegbox
from pegbox import methods
from pegbox.catalogue import describe, summary_table, text
from pegbox.core.errors import SettingsError

from .tiny import family

EVERY = [(name, preset) for name, cls in methods.catalogue().items() for preset in cls.presets]


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_every_preset_is_whole(name: str, preset: str) -> None:
    """It builds, changes something, survives JSON and says where it is from."""
    declared = methods.get(name).preset(preset)
    built = methods.make(name, {"preset": preset})
    assert built != methods.make(name)
    assert methods.make(name, json.loads(json.dumps(dict(declared.settings)))) == built
    assert re.search(r"\d{4}, arXiv:\d{4}\.\d{5}", declared.source)


def test_a_setting_beside_a_preset_wins() -> None:
    made = pegbox.method("lora", preset="llm-adapters", r=4, target_modules="q_proj")
    assert (made.rank, made.alpha, made.dropout, made.targets) == (4, 64.0, 0.05, "q_proj")  # type: ignore[attr-defined]


def test_from_python_on_a_model() -> None:
    tuned = pegbox.tune(family("llama"), "series", preset="llm-adapters", bottleneck=4)
    assert sorted(p.rpartition(".")[2] for p in tuned.sites) == sorted(2 * ["gate_proj", "up_proj", "down_proj"])


def test_from_the_command_line_and_yaml(tmp_path: Path) -> None:
    from pegbox.cli.overrides import parse
    from pegbox.train.settings import run_settings

    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: d\noutput: o\nmethod: series\nmethod.preset: houlsby\n")
    for words in ([str(recipe)], ["model=m", "data=d", "output=o", "method=series", "method.preset=houlsby"]):
        settings = run_settings(parse([*words, "method.bottleneck=8"]))
        made = methods.make(settings.method, settings.method_settings)
        assert (made.bottleneck, made.bias, made.activation) == (8, True, "gelu")  # type: ignore[attr-defined]


def test_an_alias_may_imply_one() -> None:
    assert methods.make("pfeiffer") == methods.make("series", {"preset": "pfeiffer"})
    assert methods.make("pfeiffer", {"preset": "houlsby"}) == methods.make("series", {"preset": "houlsby"})


def test_an_unknown_preset_gets_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"series has no preset 'pfeifer'; did you mean .*'pfeiffer'"):
        pegbox.method("series", preset="pfeifer")
    with pytest.raises(SettingsError, match="bitfit has no preset 'x'; there is none"):
        pegbox.method("bitfit", preset="x")


def test_they_are_listed() -> None:
    assert "series (" in str(summary_table().caption)
    assert describe("lora")["presets"]["llm-adapters"]["settings"]["rank"] == 32
    assert "llm-adapters: rank=32" in text("lora")
