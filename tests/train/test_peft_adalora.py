"""HF PEFT's AdaLoRA and AdaMSS in a whole run: they choose what is left of them while they train."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pegbox
from pegbox.train import run_settings, train
from pegbox.train.interrupt import Interrupted
from pegbox.train.progress import Progress

from . import tiny

RANKS = {"method": "peft:adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.1}
SUBSPACES = {"method": "peft:adamss", "r": 8, "num_subspaces": 3, "subspace_rank": 1, "use_asa": True}
SUBSPACES |= {"asa_target_subspaces": 6, "init_warmup": 0, "final_warmup": 5, "mask_interval": 2}


def _settings(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"model": str(base), "data": str(base / "chat.jsonl"), "output": str(output)}
    plain |= {} if "method" in changes else RANKS
    plain |= {"max_length": 64, "learning_rate": 1e-2, "batch_size": 2, "max_steps": 6, "save_steps": 2}
    return plain | changes


def _press_ctrl_c(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Between two choices: after one that some parameters rest by, and in the middle of the averages for the next."""
    if state.global_step == 4:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model_folder(folder, tiny.llama())
    tiny.chat_file(folder / "chat.jsonl")
    return folder


def test_adalora_allocates(base: Path, tmp_path: Path) -> None:
    """Half of the ranks are left at the end, as PEFT's file has them."""
    train(run_settings(_settings(base, tmp_path)))
    state = load_file(tmp_path / "adapter_model.safetensors")
    ranks = [len(value) for key, value in state.items() if key.endswith("lora_E")]
    assert sum(ranks) <= 2 * 14 < 4 * 14  # matrices
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]


@pytest.mark.filterwarnings(
    "ignore:The following rank_pattern keys",  # PEFT takes its own pattern for LoRA's
    "ignore:`is_gradient_checkpointing`",  # between PEFT and transformers
)
def test_what_is_left_of_the_ranks_loads(base: Path, tmp_path: Path) -> None:
    """Here and in PEFT, with the same outputs, and is written again as it was."""
    train(run_settings(_settings(base, tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = {"input_ids": torch.arange(5)[None] + 3}
    with torch.no_grad():
        tuned = pegbox.load(model, tmp_path).eval()
        have = tuned(**ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path)).eval()
        want = theirs(**ids).logits
        with tuned.disabled():
            apart = (tuned(**ids).logits - want).abs().max()
    assert (have - want).abs().max() < 1e-5 < 1e-3 < apart
    tuned.save(tmp_path / "again")
    first, again = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize("method", [{}, SUBSPACES], ids=["adalora", "adamss"])
def test_an_interrupted_run_ends_with_the_same_bits(
    method: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_settings(_settings(base, tmp_path / "whole", **method)))
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", _press_ctrl_c)
        with pytest.raises(Interrupted):
            train(run_settings(_settings(base, tmp_path / "cut", **method)))
    train(run_settings(_settings(base, tmp_path / "cut", resume="auto", **method)))
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[key], value) for key, value in whole.items())
