"""The zoo as a user meets it: names, folders, cards, and an adapter that is merged when first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pegbox
from pegbox import zoo
from pegbox.core.errors import ModelError
from pegbox.train.model import locate

MOST_BYTES = 24_000_000  # of all weights together


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A zoo of one base and one adapter on it; gives the tuned model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "shipped" / "base")
    base.config.name_or_path = "base"
    tuned = pegbox.tune(base, "lora", rank=2)
    for p in tuned.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    tuned.save(tmp_path / "shipped" / "chat")
    for name in ("base", "chat"):
        (tmp_path / "shipped" / name / "README.md").write_text(f"---\nlicense: mit\n---\n\n# {name}\n\nOne of two.\n")
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "shipped")
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path / "cache"))
    return tuned


def test_an_adapter_is_merged_once(small: torch.nn.Module, tmp_path: Path) -> None:
    ids = torch.arange(6)[None]
    model = zoo.load("chat", dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(model(ids).logits, small.eval()(ids).logits, rtol=0.02, atol=0.02)
    folder = zoo.folder("chat")
    assert folder.parent == tmp_path / "cache" / "zoo"
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert zoo.folder("chat") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert locate("chat") == str(folder)
    assert (zoo.entry("chat").base, zoo.entry("chat").summary) == ("base", "One of two.")


def test_a_cache_that_cannot_be_written_is_said(small: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="PEGBOX_CACHE"):
        zoo.folder("chat")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match="nano-lama"):
        zoo.load("nano-lama")


def test_weights_are_small_enough_to_ship() -> None:
    assert sum(zoo.entry(name).bytes for name in zoo.names()) <= MOST_BYTES


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_loads_with_its_card(name: str) -> None:
    model = zoo.load(name)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert not model.training
    assert len(zoo.card(name)) > 500


@pytest.mark.parametrize(
    "asked", ["What is 12 + 30?", "Say this again: good morning", "How many words are in this: the ship left at dawn"]
)
def test_the_model_that_answers_ends_its_turn(asked: str) -> None:
    model: Any = zoo.load("nano-llama-instruct", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(zoo.folder("nano-llama-instruct"))
    turns = [{"role": "user", "content": asked}]
    given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**given, max_new_tokens=60, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(out[-1:]) == "<|end|>"
    assert tokenizer.decode(out[:-1]).strip()
