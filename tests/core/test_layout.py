"""Convolutions and embeddings: the fast low-rank forms, HF PEFT's files and gradients, ties, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pegbox
from pegbox.checks.kinds import Convolutions, Lookups
from pegbox.checks.lab import shake
from pegbox.core.errors import AdapterError
from pegbox.core.files import CONFIG, TENSORS
from pegbox.core.graft import WeightGraft

CONVOLUTIONS = [
    nn.Conv1d(6, 8, 3, stride=2, padding=1),
    nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular", bias=False),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    nn.Conv2d(6, 9, 3, dilation=2, groups=3, padding=2),
    nn.Conv2d(5, 7, 1),
    nn.Conv3d(2, 4, 2, stride=2),
]


def seeded(build: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


def inputs(conv: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, conv.in_channels, *[9, 7, 5][: len(conv.kernel_size)], generator=g)  # type: ignore[arg-type]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("name", ["lora", "miss"])
def test_a_thin_convolution_is_the_sum_of_kernels(conv: nn.Module, name: str) -> None:
    tuned = shake(pegbox.tune(nn.Sequential(conv), name, targets="0", rank=3))
    x = inputs(conv)
    fast = tuned(x)
    graft = next(iter(tuned.sites.values())).chain[0]
    w = graft.weight(conv.weight.flatten(1)).reshape(conv.weight.shape)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(fast, conv._conv_forward(x, w, conv.bias))  # type: ignore[operator]
    torch.testing.assert_close(tuned.merge()(x), fast)
    tuned.detach()


@pytest.mark.parametrize("name", ["lora", "miss", "dora"])
def test_a_lookup_is_a_row_of_the_changed_matrix(name: str) -> None:
    table = nn.Embedding(11, 8, padding_idx=2)
    tuned = shake(pegbox.tune(nn.Sequential(table), name, targets="0", rank=3))
    ids = torch.tensor([[0, 2, 5], [10, 5, 2]])
    graft = next(iter(tuned.sites.values())).chain[0]
    w = graft.weight(table.weight.T)  # type: ignore[operator]
    torch.testing.assert_close(tuned(ids), F.embedding(ids, w.T))
    torch.testing.assert_close(tuned.merge()(ids), tuned.unmerge()(ids))


def test_the_padding_token_gives_no_gradient() -> None:
    for plain in (False, True):
        tuned = shake(pegbox.tune(nn.Sequential(nn.Embedding(11, 8, padding_idx=2)), "lora", targets="0", rank=3))
        graft = tuned.adapter().grafts["0"]
        if plain:
            graft.__dict__["forward"] = WeightGraft.forward.__get__(graft)
        tuned(torch.tensor([[2, 2]])).square().sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in graft.parameters())


def test_an_embedding_with_its_own_forward_gets_the_whole_matrix() -> None:
    model = seeded(Lookups)
    tuned = shake(pegbox.tune(model, "lora", targets=("scaled",), rank=3))
    ids = torch.arange(12).reshape(2, 6)
    want = tuned(ids)
    assert not torch.allclose(want, tuned.merge()(ids) * 0)
    torch.testing.assert_close(tuned.model(ids), want)


def test_a_conv1d_of_transformers_is_a_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    tuned = shake(pegbox.tune(nn.Sequential(Conv1D(6, 4)), "lora", targets="0", rank=2))
    assert next(iter(tuned.sites.values())).shape == (6, 4)


# -- targets ---------------------------------------------------------------------------------------------------------


def test_all_linear_is_no_convolution_and_no_embedding() -> None:
    for model in (Convolutions(), Lookups()):
        assert list(pegbox.tune(model, "lora", rank=2).sites) == ["mix"]


def test_convolutions_and_embeddings_are_named() -> None:
    assert list(pegbox.tune(Convolutions(), "lora", rank=2, targets=r"line|point").sites) == ["point", "line"]
    assert list(pegbox.tune(Lookups(), "lora", rank=2, targets="embed").sites) == ["embed", "scaled"]


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """What HF PEFT's LoRA has a form for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.line = nn.Conv1d(8, 6, 3)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:  # (B, 9, 7) -> (B, 3)
        h = self.conv(self.table(ids).permute(0, 3, 1, 2)).tanh()
        h = self.line(h.flatten(2)).mean(-1)
        out: Tensor = self.out(h)
        return out


IDS = torch.randint(20, (3, 9, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ("table", "conv", "line", "out")


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_files_outputs_and_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tuned = shake(pegbox.tune(seeded(Small), name, targets=TARGETS, rank=2, alpha=6.0))
    tuned.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(seeded(Small), str(tmp_path / "ours"), is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS), tuned(IDS), rtol=1e-5, atol=1e-5)
    for model in (theirs, tuned):
        model(IDS).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.copy_(p.grad)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tuned.save(tmp_path / "gradients")
    from safetensors.torch import load_file

    want, have = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "gradients" / TENSORS)
    assert have.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(have[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_pefts_files_load(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=list(TARGETS), r=2, lora_alpha=6, use_dora=name == "dora")
    theirs = peft.get_peft_model(seeded(Small), config).eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in theirs.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    theirs.save_pretrained(str(tmp_path))
    tuned = pegbox.load(seeded(Small), tmp_path)
    assert tuned.method.name() == name
    torch.testing.assert_close(tuned(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


def test_what_peft_cannot_hold_is_written_in_our_own_keys(tmp_path: Path) -> None:
    tuned = shake(pegbox.tune(seeded(Convolutions), "lora", targets="groups", rank=2))
    tuned.save(tmp_path)
    assert "pegbox" in json.loads((tmp_path / CONFIG).read_text())
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(pegbox.load(seeded(Convolutions), tmp_path)(x), tuned(x))


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    pegbox.tune(nn.Sequential(nn.Conv2d(4, 6, 3)), "lora", targets="0", rank=2).save(tmp_path)
    with pytest.raises(AdapterError):
        pegbox.load(nn.Sequential(nn.Conv2d(4, 6, 5)), tmp_path)


# -- ties --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["embed", "head"])
def test_merging_one_end_of_a_tie_leaves_the_other(end: str) -> None:
    from pegbox.checks.models import tied

    model: Any = seeded(tied).eval()
    tuned = shake(pegbox.tune(model, "lora", targets=end, rank=2))
    ids = torch.arange(8)[None]
    before = model.lm_head.weight.detach().clone()
    want = tuned(input_ids=ids).logits
    tuned.merge()
    ends = {"embed": model.get_input_embeddings().weight, "head": model.lm_head.weight}
    assert not torch.equal(ends.pop(end), before)
    assert torch.equal(ends.popitem()[1], before)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model(input_ids=ids).logits, want)
    tuned.unmerge()
    assert model.get_input_embeddings().weight is model.lm_head.weight
