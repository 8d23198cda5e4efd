"""IA3 by its paper, and HF PEFT's: which side is scaled, biases, counts, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import classified_text, text, translation
from pegbox.methods.ia3 import IA3

from .tiny import family, on_linear


@pytest.mark.parametrize("inputs", [False, True])
def test_the_equation(inputs: bool) -> None:
    """y = l * (W x + b), or W (l * x) + b; merged, weight and bias carry it."""
    method = IA3(targets=(), inputs=".*") if inputs else IA3(targets=".*", inputs=())
    tuned, graft, w = on_linear(method, 12, 10, bias=True)
    model: Any = tuned.model
    (scale,), b, x = graft.parameters(), model[0].bias.detach().clone(), torch.randn(4, 10)
    want = F.linear(scale * x, w, b) if inputs else scale * F.linear(x, w, b)
    assert torch.allclose(tuned(x), want, atol=1e-6)
    assert torch.allclose(tuned.merge()(x), want, atol=1e-6)


def test_parameters_of_the_paper() -> None:
    """Keys, values and the MLP's inner width, a block; here with two of four heads for keys and values."""
    tuned = pegbox.tune(family("llama"), "ia3")
    assert tuned.count()[0] == 2 * (16 + 16 + 48)
    assert {v.mean().item() for v in tuned.state().values()} == {1.0}


def test_vectors_are_not_decayed() -> None:
    assert [g["weight_decay"] for g in pegbox.tune(family("llama"), "ia3").groups(1e-3, 0.1)] == [0.0]


def test_the_forward_never_makes_a_matrix() -> None:
    """A scaled matrix would be as large as the matrix; nothing of that size is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "view" not in str(func) and func is not torch.ops.aten.t.default:
                sizes.append(out.numel())
            return out

    tuned, _, _ = on_linear(IA3(targets=".*", inputs=()), 120, 100, bias=True)
    with Made(), torch.no_grad():
        tuned(torch.randn(2, 100))
    assert max(sizes) <= 2 * 120


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_pefts_own_choice_of_targets_loads(tmp_path: Path, name: str) -> None:
    """A configuration that names modules as PEFT's tables do, regex and all; outputs are the same."""
    from peft import IA3Config, get_peft_model

    model = family(name)
    before: Any = {"llama": ["down_proj"], "bert": ["output.dense"], "t5": r".*DenseReluDense\.wo"}[name]
    targets = {
        "llama": ["k_proj", "v_proj", "down_proj"],
        "bert": ["key", "value", "output.dense"],
        "t5": ["k", "v", "wo"],
    }
    theirs: Any = get_peft_model(model, IA3Config(target_modules=targets[name], feedforward_modules=before)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = pegbox.load(family(name), tmp_path)
    batch = {"llama": text, "bert": classified_text, "t5": translation}[name]
    assert torch.allclose(ours(**batch(0)).logits, theirs(**batch(0)).logits, atol=1e-5)


def test_rows_of_a_matrix_are_written_in_our_keys(tmp_path: Path) -> None:
    """GPT-2 keeps q, k and v in one matrix, of which PEFT can name no part."""
    tuned = shake(pegbox.tune(family("gpt2"), "ia3")).eval()
    want = tuned(**text(0)).logits
    tuned.save(tmp_path)
    assert torch.equal(pegbox.load(family("gpt2"), tmp_path)(**text(0)).logits, want)
