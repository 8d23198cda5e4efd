"""GradNormLoRP: a DoRA or the model's own matrices, under Adam in subspaces of their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import pegbox
from pegbox import methods
from pegbox.checks.lab import shake
from pegbox.core import Tuned
from pegbox.core.errors import SettingsError
from pegbox.data.collate import PadCollator
from pegbox.data.encoded import Encoded
from pegbox.methods.dora import DoRAGraft
from pegbox.methods.gradnormlorp import GradNormLoRP
from pegbox.train import Trainer
from pegbox.updates.projected import ProjectedAdamW

from .tiny import family

SMALL = {"rank": 8, "projection_rank": 2, "gap": 3}


def made(**settings: Any) -> tuple[Tuned, ProjectedAdamW]:
    """A tiny Llama under the method, and the method's optimizer."""
    tuned = pegbox.tune(family("llama"), "gradnormlorp", **SMALL | settings)
    optimizer = tuned.adapter().method.optimizer(tuned.groups(1e-2, 0.1))
    assert isinstance(optimizer, ProjectedAdamW)
    return tuned, optimizer


def train(tuned: Tuned, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    ids = torch.randint(3, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = tuned(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def projected(tuned: Tuned, optimizer: ProjectedAdamW) -> set[str]:
    return {
        name for name, p in tuned.trainable().items() if "left" in optimizer.state[p] or "right" in optimizer.state[p]
    }


def test_an_adapter_is_dora_at_the_start_and_after() -> None:
    ids = torch.arange(3, 11)[None]
    want = family("llama")(input_ids=ids).logits
    tuned, _ = made()
    assert all(isinstance(g, DoRAGraft) for g in tuned.adapter().grafts.values())
    assert torch.allclose(tuned(input_ids=ids).logits, want, atol=1e-5)
    dora = pegbox.tune(family("llama"), "dora", rank=8)
    assert tuned.trainable().keys() == dora.trainable().keys()
    shake(tuned, 1)
    dora.load_state(tuned.state())
    assert torch.equal(tuned(input_ids=ids).logits, dora(input_ids=ids).logits)


def test_factors_are_projected_and_lengths_are_not() -> None:
    tuned, optimizer = made()
    losses = train(tuned, optimizer, 10)
    assert losses[-1] < losses[0]
    assert projected(tuned, optimizer) == {name for name in tuned.trainable() if name.endswith((".a", ".b"))}
    assert not any("g" in state for state in optimizer.state.values())


def test_a_rank_that_factors_do_not_exceed_is_doras_adamw() -> None:
    tuned, optimizer = made(projection_rank=8, scale=4.0)
    dora = pegbox.tune(family("llama"), "dora", rank=8)
    dora.load_state(tuned.state())
    train(tuned, optimizer)
    train(dora, torch.optim.AdamW(dora.groups(1e-2, 0.1)))
    assert all(torch.allclose(value, dora.state()[key], atol=1e-5) for key, value in tuned.state().items())


def test_the_models_own_matrices_train_with_lengths_of_their_own() -> None:
    tuned, optimizer = made(mode="full", targets=".*", plain=("embed_tokens", "lm_head"))
    assert not tuned.adapter().grafts
    before = {name: p.detach().clone() for name, p in tuned.trainable().items()}
    losses = train(tuned, optimizer, 10)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in tuned.trainable().items())
    inside = projected(tuned, optimizer)
    assert inside == {n for n, p in before.items() if p.ndim > 1 and "embed_tokens" not in n and "lm_head" not in n}
    for name in inside:
        p = tuned.trainable()[name]
        assert torch.allclose(p.norm(dim=1), optimizer.state[p]["g"], atol=1e-5)
    rest = [optimizer.state[p] for name, p in tuned.trainable().items() if name not in inside]
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in rest)


def test_linear_layers_alone_by_default() -> None:
    tuned, _ = made(mode="full")
    assert all(".layers." in name for name in tuned.trainable())


def test_the_state_is_smaller_than_adams() -> None:
    tuned, optimizer = made(mode="full", projection_rank=4)
    train(tuned, optimizer, 1)
    held = sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step")
    assert held < sum(p.numel() for p in tuned.trainable().values())  # Adam's is twice that


def test_groups_keep_rates_and_decay() -> None:
    tuned, optimizer = made(mode="full", targets=".*", plain="embed_tokens")
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(tuned.trainable())
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-2
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    (plain,) = (group for group in optimizer.param_groups if group["rank"] is None)
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in plain["names"]] == ["embed_tokens"]


def test_a_module_trained_whole_has_plain_adam() -> None:
    tuned = pegbox.tune(family("llama"), "gradnormlorp", also_train=("lm_head",), **SMALL)
    optimizer = tuned.adapter().method.optimizer(tuned.groups(1e-2))
    assert optimizer is not None
    ranks = {name: group["rank"] for group in optimizer.param_groups for name in group["names"]}
    assert {name for name, rank in ranks.items() if rank is None} == {"copy.lm_head.weight"}
    with pytest.raises(SettingsError, match="plain names nothing"):
        made(plain="embed_token")


def test_plain_must_name_something() -> None:
    with pytest.raises(SettingsError, match="plain names nothing that trains: 'embed_token'"):
        made(mode="full", targets=".*", plain="embed_token")


@pytest.mark.parametrize("preset", ["glue", "llama-60m"])
def test_presets(preset: str) -> None:
    method = methods.make("gradnormlorp", {"preset": preset})
    assert isinstance(method, GradNormLoRP)
    tuned = pegbox.tune(family("llama"), method)
    assert method.optimizer(tuned.groups(1e-3)) is not None
    assert method.traits.keeps_base == (preset == "glue")


@pytest.mark.parametrize("settings", [{}, {"mode": "full"}, {"bits": 8}], ids=str)
def test_a_run_resumes_to_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Through the checkpoints of pegbox.Trainer, with accumulated gradients."""
    if "bits" in settings:
        pytest.importorskip("bitsandbytes")
    rows = [
        Encoded([3 + (i + j) % 9 for j in range(4 + i % 5)], [3 + (i + j) % 9 for j in range(4 + i % 5)], "")
        for i in range(24)
    ]

    def trainer(folder: Path) -> Trainer:
        plain = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 4}
        more = {"learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
        args = TrainingArguments(str(folder), **plain | more)
        tuned = pegbox.tune(family("llama"), "gradnormlorp", **SMALL | settings)
        return Trainer(tuned, "causal_lm", args, train_dataset=rows, data_collator=PadCollator(0))

    whole, resumed = trainer(tmp_path), trainer(tmp_path)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, ProjectedAdamW)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    want, have = whole.tuned.state(), resumed.tuned.state()
    assert want.keys() == have.keys()
    assert all(torch.equal(value, have[key]) for key, value in want.items())
    assert any(load_file(path) for path in (tmp_path / "checkpoint-4").glob("*.safetensors"))
