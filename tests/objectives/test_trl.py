"""Each preference objective against TRL's own loss code, on the same batch with the same weights."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pegbox import objectives

from .conftest import LLAMA
from .preferences import answers, assert_same, gradients, half, padded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL's own, about what is experimental there
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.utils import add_fused_lm_head

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FUSED = ("log_probs", "entropy", "mean_logits", "is_top1")


def policy_and_reference() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.2))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, reference


def of(cls: Any, model: nn.Module, **attributes: Any) -> Any:
    """A trainer of TRL with no more than its loss reads."""
    trainer = object.__new__(cls)
    plain: dict[str, Any] = {
        "model": model,
        "accelerator": Accelerator(cpu=True),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(plain | attributes)
    return trainer


def with_fused_head(model: nn.Module) -> nn.Module:
    """A copy that shares its parameters, and has the head that TRL puts on."""
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    add_fused_lm_head(shared, outputs=FUSED)
    return shared


def batch_for_trl(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = (batch["labels"] != -100).long()
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": mask}


def ours(name: str, model: nn.Module, batch: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    reference = options.pop("reference", None)
    losses = objectives.get(name).given(options, reference=reference)(model, batch)
    total = torch.stack(list(losses.values())).sum()
    return total, gradients(total, model)


def both(loss: Tensor, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    return loss, gradients(loss, model)


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        ("dpo", "sigmoid", {"beta": 0.3}),
        ("dpo", "hinge", {"beta": 0.05, "loss": "hinge"}),
        ("dpo", "robust", {"beta": 0.3, "loss": "robust", "label_smoothing": 0.2}),
        ("ipo", "ipo", {"beta": 0.3}),
    ],
)
def test_dpo_and_its_kin(name: str, loss: str, options: dict[str, Any]) -> None:
    model, reference = policy_and_reference()
    batch = padded(answers())
    trainer = of(
        DPOTrainer,
        with_fused_head(model),
        ref_model=with_fused_head(reference),
        loss_types=[loss],
        loss_weights=[1.0],
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
    )
    theirs = trainer._compute_loss(trainer.model, batch_for_trl(batch), False)
    assert_same(ours(name, model, batch, reference=reference, **options), both(theirs, model))
    found = objectives.get(name).given(options, reference=reference)
    measured = found.measure(found.predict(model, batch))
    kept = trainer._metrics["train"]
    assert measured["reward_margin"] == pytest.approx(kept["rewards/margins"][0], abs=1e-5)
    assert measured["reward_accuracy"] == pytest.approx(kept["rewards/accuracies"][0])
    assert measured["loss"] == pytest.approx(theirs.item(), abs=1e-5)


def halves_for_trl(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    sides = {"chosen": half(batch, True), "rejected": half(batch, False)}
    return {f"{side}_{key}": value for side, rows in sides.items() for key, value in rows.items()}


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo(beta: float) -> None:
    model, _ = policy_and_reference()
    batch = padded(answers())
    trainer = of(ORPOTrainer, model, beta=beta, padding_value=0)
    theirs, kept = trainer.get_batch_loss_metrics(model, halves_for_trl(batch))
    assert_same(ours("orpo", model, batch, beta=beta), both(theirs, model))
    found = objectives.get("orpo").given({"beta": beta})
    measured = found.measure(found.predict(model, batch))
    assert measured["reward_margin"] == pytest.approx(kept["rewards/margins"], abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float) -> None:
    model, _ = policy_and_reference()
    batch = padded(answers())
    trainer = of(
        CPOTrainer,
        model,
        beta=2.0,
        simpo_gamma=0.6,
        alpha=0.0,
        cpo_alpha=0.0,
        loss_type="simpo",
        label_smoothing=smoothing,
        pad_token_id=0,
    )
    theirs, kept = trainer.get_batch_loss_metrics(model, halves_for_trl(batch))
    options = {"beta": 2.0, "gamma": 0.6, "label_smoothing": smoothing}
    assert_same(ours("simpo", model, batch, **options), both(theirs, model))
    found = objectives.get("simpo").given(options)
    assert found.measure(found.predict(model, batch))["reward_margin"] == pytest.approx(
        kept["rewards/margins"], abs=1e-5
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("desirable", [[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6])
def test_kto(weights: tuple[float, float], desirable: list[int]) -> None:
    model, reference = policy_and_reference()
    own, mismatched = padded(answers()), padded(answers(seed=2))
    label = torch.tensor(desirable)
    trainer = of(
        KTOTrainer,
        with_fused_head(model),
        ref_model=with_fused_head(reference),
        calculate_KL=True,
        precompute_ref_logps=False,
        loss_type="kto",
        beta=0.2,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    given = batch_for_trl(own) | {f"KL_{k}": v for k, v in batch_for_trl(mismatched).items()} | {"label": label.bool()}
    theirs = trainer._compute_loss(trainer.model, given, False)
    batch = own | {"desirable": label} | {f"mismatched_{k}": v for k, v in mismatched.items()}
    options = {"beta": 0.2, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    assert_same(ours("kto", model, batch, reference=reference, **options), both(theirs, model))
    found = objectives.get("kto").given(options, reference=reference)
    measured = found.measure(found.predict(model, batch))
    assert measured["kl"] == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-5)
    assert measured["loss"] == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 1.5]])
def test_reward(centre: float, margin: list[float] | None) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1, initializer_range=0.2))
    batch = padded(answers())
    if margin is not None:
        batch["margin"] = torch.tensor(margin)
    trainer = of(RewardTrainer, model)
    trainer.args.center_rewards_coefficient = centre or None
    theirs = trainer.compute_loss(model, {k: v for k, v in batch.items() if k != "labels"})
    assert_same(ours("reward", model, batch, centre=centre), both(theirs, model))
    found = objectives.get("reward").given({"centre": centre})
    measured = found.measure(found.predict(model, batch))
    assert measured["reward_margin"] == pytest.approx(trainer._metrics["train"]["margin"][0], abs=1e-5)
