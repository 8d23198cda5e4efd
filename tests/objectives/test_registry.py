from __future__ import annotations

import subprocess
import sys

import pytest

from pegbox import objectives
from pegbox.core.errors import SettingsError


@pytest.mark.parametrize("name", objectives.NAMES)
def test_every_objective_is_found_by_its_name(name: str) -> None:
    assert objectives.get(name).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("CAUSAL_LM", "causal_lm"),
        ("sequence-classification", "sequence_classification"),
        ("SEQ_CLS", "sequence_classification"),
        ("TOKEN_CLS", "token_classification"),
        ("Token Classification", "token_classification"),
        ("SFT", "sft"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert objectives.canonical(alias) == name
    assert objectives.get(alias) is objectives.get(name)


@pytest.mark.parametrize("alias", objectives.ALIASES)
def test_every_alias_means_a_name(alias: str) -> None:
    assert objectives.canonical(alias) in objectives.NAMES


def test_unknown_objective_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="unknown objective 'casual_lm'; did you mean 'causal_lm'"):
        objectives.get("casual_lm")


def test_importing_the_registry_does_not_import_torch() -> None:
    code = "import sys, pegbox.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
