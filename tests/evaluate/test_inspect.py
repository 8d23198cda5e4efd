from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pegbox
from pegbox.core.errors import AdapterError, ModelError, SettingsError
from pegbox.evaluate.inspect import inspect, inspect_settings


def test_a_model_and_what_a_method_would_tune(bases: Path) -> None:
    text = inspect(inspect_settings({"model": str(bases / "llama"), "method": "lora", "method.rank": 2}))
    assert "LlamaForCausalLM" in text
    assert "model.layers.*.self_attn.q_proj" in text
    from transformers import AutoModelForCausalLM

    tuned = pegbox.tune(AutoModelForCausalLM.from_pretrained(bases / "llama"), "lora", rank=2)
    some, all_ = tuned.count()
    assert f"lora: {some:,} of {all_:,} parameters train" in text
    assert f"{len(tuned.sites)} modules" in text


def test_an_adapter(bases: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tuned = pegbox.tune(AutoModelForCausalLM.from_pretrained(bases / "llama"), "miss", rank=3)
    tuned.save(tmp_path / "a")
    text = inspect(inspect_settings({"adapter": str(tmp_path / "a")}))
    assert "miss" in text
    assert str(bases / "llama") in text
    assert f"{sum(t.numel() for t in tuned.state().values()):,} numbers" in text


def test_no_weight_is_read(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("weights were drawn or read")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert "6 blocks" not in inspect(inspect_settings({"model": str(bases / "bert")}))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"model": "nothing/here/at/all"}, ModelError),
        ({"adapter": "nothing"}, AdapterError),
        ({"model": "minilm", "method.rank": 2}, SettingsError),
        ({"model": "minilm", "method": "lorra"}, SettingsError),
        ({"modle": "minilm"}, SettingsError),
    ],
)
def test_mistakes(values: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        inspect(inspect_settings(values))
