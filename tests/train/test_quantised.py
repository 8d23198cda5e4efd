"""Adapters over a base that a quantiser has stored in a few bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import pegbox
from pegbox.core.errors import MethodError
from pegbox.train import Trainer

from . import tiny


def said_to_be_quantised() -> LlamaForCausalLM:
    """What transformers looks at, on a base whose numbers are plain."""
    model = tiny.llama()
    marks: dict[str, Any] = {"is_quantized": True, "quantization_method": SimpleNamespace(value="nobits")}
    marks["hf_quantizer"] = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    for name, value in marks.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("method", ["lora", "series"])
@pytest.mark.parametrize("ours", [True, False])
def test_transformers_trains_adapters_over_it(tmp_path: Path, method: str, ours: bool) -> None:
    tuned = pegbox.tune(said_to_be_quantised(), method)
    before = {name: value.clone() for name, value in tuned.state().items()}
    given: dict[str, Any] = {"train_dataset": tiny.rows(), "data_collator": tiny.COLLATE}
    args = tiny.arguments(tmp_path, max_steps=2)
    if ours:
        trainer: Any = Trainer(tuned, "causal_lm", args, **given)
    else:
        trainer = transformers.Trainer(model=tuned, args=args, callbacks=[pegbox.Callback(tuned)], **given)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in tuned.state().items())


def test_the_base_itself_is_not_trained_in_a_few_bits(tmp_path: Path) -> None:
    tuned = pegbox.tune(said_to_be_quantised(), "full")
    with pytest.raises(MethodError, match=r"full trains the base's own tensors, and this base is stored by nobits"):
        Trainer(tuned, "causal_lm", tiny.arguments(tmp_path))
    with pytest.raises(MethodError, match=r"use a method that keeps the base \(lora, series"):
        pegbox.Callback(tuned)


def test_a_plain_base_is_left_alone() -> None:
    tuned = pegbox.tune(tiny.llama(), "lora", rank=4)
    pegbox.Callback(tuned)
    assert "_hf_peft_config_loaded" not in vars(tuned)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.model_folder(tmp_path / "base", tiny.llama())
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    stored = {name: value.clone() for name, value in base.named_parameters()}
    tuned = pegbox.tune(base, "lora", rank=4)
    trainer = Trainer(
        tuned, "causal_lm", tiny.arguments(tmp_path, max_steps=8), train_dataset=tiny.rows(), data_collator=tiny.COLLATE
    )
    trainer.train()
    losses = tiny.losses(trainer)
    assert sum(losses[-2:]) < sum(losses[:2])
    for name, value in base.named_parameters():
        assert torch.equal(value, stored[name]), name


def test_bitsandbytes_is_not_trained_itself(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.model_folder(tmp_path / "base", tiny.llama())
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    with pytest.raises(pegbox.PegboxError, match="full"):
        Trainer(pegbox.tune(base, "full"), "causal_lm", tiny.arguments(tmp_path))
