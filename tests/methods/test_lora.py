"""LoRA by its papers: scaling, learning rates, ranks; PEFT's switches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pegbox
from pegbox.core import files
from pegbox.core.errors import AdapterError, SettingsError
from pegbox.methods.lora import LoRA, LoRAGraft

from .tiny import family, on_linear


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale(rslora: bool, scale: float) -> None:
    """alpha / r, and alpha / sqrt(r) for rsLoRA."""
    _, graft, w = on_linear(LoRA(rank=4, alpha=8.0, rslora=rslora, targets=".*"), 12, 10)
    assert isinstance(graft, LoRAGraft)
    assert torch.allclose(graft.weight(w) - w, scale * graft.b @ graft.a, atol=1e-6)


def test_a_is_drawn_as_the_authors_draw_it() -> None:
    """Uniform in +-1 / sqrt(in), which is kaiming with a = sqrt(5)."""
    a = pegbox.tune(torch.nn.Sequential(torch.nn.Linear(400, 64)), "lora", rank=64, targets=".*").trainable()[
        "graft.0.a"
    ]
    assert a.abs().max() <= 1 / 20
    assert a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_b_learns_faster_with_lora_plus() -> None:
    tuned = pegbox.tune(family("llama"), "lora+", rank=4)
    rates = {name.rpartition(".")[2]: g["lr"] for g in tuned.groups(1e-3, 0.1) for name in g["names"]}
    assert rates == {"a": pytest.approx(1e-3), "b": pytest.approx(16e-3)}
    assert {g["weight_decay"] for g in tuned.groups(1e-3, 0.1)} == {0.1}


def test_without_lora_plus_there_is_one_group() -> None:
    assert len(pegbox.tune(family("llama"), "lora", rank=4).groups(1e-3)) == 1


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"rank must be 1\.\.16 at .*k_proj .*got 17"):
        pegbox.tune(family("llama"), "lora", rank=17)


def test_parameters_of_the_card() -> None:
    """r (i + o) a site."""
    tuned = pegbox.tune(family("llama"), "lora", rank=4, targets="q_proj")
    assert tuned.count()[0] == 2 * 4 * (32 + 32)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq"])
def test_pefts_adapters_that_change_the_base_are_refused(tmp_path: Path, init: str) -> None:
    """PEFT would change W too when it loads them, from values that are not in the file."""
    import json

    from safetensors.torch import load_file, save_file

    pegbox.tune(family("llama"), "lora", rank=4).save(tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}'"):
        files.read(tmp_path, [LoRA])
    with pytest.raises(AdapterError):
        pegbox.load(family("llama"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_trained_head_goes_to_peft_and_back(tmp_path: Path) -> None:
    """`also_train` is PEFT's `modules_to_save`, which it adds by itself for classification."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from pegbox.checks.lab import shake
    from pegbox.checks.models import classified_text

    batch = classified_text(0)
    ours = shake(pegbox.tune(family("bert"), "lora", rank=4, also_train=["head"])).eval()
    ours.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(family("bert"), tmp_path / "ours").eval()
    assert torch.allclose(theirs(**batch).logits, ours(**batch).logits, atol=1e-5)

    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    made = get_peft_model(family("bert"), config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "theirs")
    loaded = pegbox.load(family("bert"), tmp_path / "theirs")
    assert torch.allclose(loaded(**batch).logits, made(**batch).logits, atol=1e-5)
    assert len(loaded.adapter().copies) == 1
