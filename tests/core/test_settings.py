"""One declaration of a setting serves Python, YAML, the command line and JSON Schema; mistakes name the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pegbox import methods
from pegbox.core.errors import SettingsError
from pegbox.core.settings import build, check, schema, setting


@dataclass(frozen=True, kw_only=True)
class Example:
    rank: int = setting(16, "rank of the update", at_least=1, at_most=64)
    rate: float = setting(0.1, "a rate", above=0, below=1)
    mode: Literal["a", "b"] = setting("a", "which")
    names: str | tuple[str, ...] = setting((), "names")
    maybe: int | None = setting(None, "none for never", at_least=1)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"rank": "8"}, {"rank": 8}),
        ({"rate": "1e-3"}, {"rate": 1e-3}),
        ({"names": ["x", "y"]}, {"names": ("x", "y")}),
        ({"names": "x"}, {"names": "x"}),
        ({"maybe": None}, {"maybe": None}),
    ],
)
def test_reads_what_each_source_gives(given: dict[str, Any], want: dict[str, Any]) -> None:
    built = build(Example, given)
    assert {k: getattr(built, k) for k in want} == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranc": 8}, "example has no setting 'ranc'; did you mean 'rank'"),
        ({"rank": 0}, "example.rank must be at least 1, got 0"),
        ({"rank": 65}, "example.rank must be at most 64, got 65"),
        ({"rank": "many"}, "example.rank must be a whole number, got 'many'"),
        ({"rank": True}, "example.rank must be a whole number, got True"),
        ({"rate": 0}, "example.rate must be above 0, got 0.0"),
        ({"rate": 1}, "example.rate must be below 1, got 1.0"),
        ({"mode": "c"}, "example.mode must be one of 'a', 'b', got 'c'"),
        ({"maybe": 0}, "example.maybe must be at least 1, got 0"),
    ],
)
def test_a_mistake_names_the_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        build(Example, given, what="example")
    assert message in str(error.value)


def test_a_constructor_only_stores_and_check_looks() -> None:
    wrong = Example(rank=-3)
    with pytest.raises(SettingsError, match="at least 1"):
        check(wrong)


def test_schema_says_the_same() -> None:
    rank = schema(Example)["properties"]["rank"]
    assert rank == {"type": "integer", "default": 16, "minimum": 1, "maximum": 64, "description": "rank of the update"}
    assert schema(Example)["additionalProperties"] is False


@pytest.mark.parametrize("name", methods.names())
def test_every_setting_of_every_method_is_documented(name: str) -> None:
    for key, spec in schema(methods.get(name))["properties"].items():
        assert spec.get("description"), f"{name}.{key}"
        assert "default" in spec, f"{name}.{key}"


@pytest.mark.parametrize(
    ("alias", "settings", "want"),
    [
        ("bone", {"bone_r": 8}, ("miss", {"rank": 8})),
        ("rslora", {"lora_r": 4, "lora_alpha": 8}, ("lora", {"rank": 4, "alpha": 8.0, "rslora": True})),
        ("lora+", {"b_rate": 4}, ("lora", {"b_rate": 4.0})),
        ("LoRA", {"target_modules": ["q_proj"]}, ("lora", {"targets": ("q_proj",)})),
    ],
)
def test_names_of_other_tools(alias: str, settings: dict[str, Any], want: tuple[str, dict[str, Any]]) -> None:
    method = methods.make(alias, settings)
    assert method.name() == want[0]
    assert {k: getattr(method, k) for k in want[1]} == want[1]


def test_one_setting_under_two_names() -> None:
    with pytest.raises(SettingsError, match=r"lora\.rank is given twice"):
        methods.make("lora", {"rank": 4, "lora_r": 8})


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="unknown method 'lorra'; did you mean 'lora'"):
        methods.make("lorra")
