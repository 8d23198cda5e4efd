from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

import pegbox
from pegbox import objectives
from pegbox.core.errors import DataError
from pegbox.objectives.causal_lm import causal_lm, count, targets

from .conftest import LLAMA, V, packed, padded


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def nll(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    losses = causal_lm(model, batch, **options)
    assert list(losses) == ["nll"]
    return losses["nll"]


def test_equals_the_models_own_loss(model: nn.Module, examples: list[Tensor]) -> None:
    batch = padded(examples)
    assert_same(model, nll(model, batch), model(**batch).loss)


def test_packed_equals_padded(model: nn.Module, examples: list[Tensor]) -> None:
    assert_same(model, nll(model, packed(examples)), nll(model, padded(examples)))


def test_nothing_predicts_the_first_token_of_a_packed_example(llama: nn.Module, examples: list[Tensor]) -> None:
    """Even where the data labels it; in a padded row no token comes before it."""
    one, many = packed(examples, prompt=0), padded(examples, prompt=0)
    assert count(one) == count(many) == sum(len(e) - 1 for e in examples)
    assert_same(llama, nll(llama, one), nll(llama, many))


def test_targets_are_the_next_tokens() -> None:
    batch = {
        "labels": torch.tensor([[1, 2, -100, 4, 5, 6]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        "token_weights": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    }
    labels, weights = targets(batch)
    assert labels.tolist() == [[2, -100, -100, 5, 6, -100]]
    assert weights is not None
    assert weights.tolist() == [[2.0, 3.0, 4.0, 5.0, 6.0, 0.0]]
    assert count(batch).item() == 2.0 + 5.0 + 6.0


def test_label_smoothing_is_that_of_transformers(llama: nn.Module, examples: list[Tensor]) -> None:
    batch = padded(examples)
    smoother = LabelSmoother(epsilon=0.1)
    theirs = smoother(llama(**batch), batch["labels"], shift_labels=True)
    assert_same(llama, nll(llama, batch, label_smoothing=0.1), theirs)
    items = count(batch)
    theirs = smoother(llama(**batch), batch["labels"], shift_labels=True, num_items_in_batch=2 * items)
    assert_same(llama, nll(llama, batch, label_smoothing=0.1, num_items=2 * items), theirs)


def test_token_weights(llama: nn.Module, examples: list[Tensor]) -> None:
    batch = padded(examples)
    batch["token_weights"] = torch.rand(batch["labels"].shape)
    logits, labels = llama(batch["input_ids"], batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    weights = batch["token_weights"][:, 1:]
    expected = (losses * weights).sum() / weights[labels != -100].sum()
    assert_same(llama, nll(llama, batch), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_micro_batches_equal_the_whole(llama: nn.Module, examples: list[Tensor], weighted: bool) -> None:
    whole = padded(examples)
    if weighted:
        whole["token_weights"] = torch.rand(whole["labels"].shape)
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(len(examples))]
    items = sum(count(part) for part in parts)
    accumulated = sum(nll(llama, part, num_items=items) for part in parts)
    assert isinstance(accumulated, Tensor)
    assert_same(llama, accumulated, nll(llama, whole))


def test_batch_without_labels_to_learn_is_zero(llama: nn.Module, examples: list[Tensor]) -> None:
    batch = padded(examples)
    batch["labels"].fill_(-100)
    loss = nll(llama, batch)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, llama))
    assert nll(llama, batch, num_items=7).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tuned_model(llama: nn.Module, examples: list[Tensor], dtype: torch.dtype) -> None:
    batch = padded(examples)
    tuned = pegbox.tune(llama.to(dtype), "lora", rank=4)
    loss = nll(tuned, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(llama(**batch).loss.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in tuned.trainable().values())
    with tuned.disabled():
        assert nll(tuned, batch).item() == pytest.approx(loss.item(), rel=1e-5)


class Bare(nn.Module):
    """No head to be found, no cache, no config."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.embed, self.out, self.wrap = nn.Embedding(V, 8), nn.Linear(8, V), wrap

    def forward(self, input_ids: Tensor) -> Any:
        return self.wrap(self.out(self.embed(input_ids)))


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: (z,), lambda z: SimpleNamespace(logits=z)]
)
def test_any_module_that_returns_logits(wrap: Any) -> None:
    model, ids = Bare(wrap), torch.randint(V, (2, 6))
    loss = nll(model, {"input_ids": ids, "labels": ids})
    logits = model.out(model.embed(ids))
    assert_same(model, loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_router_loss_is_added_as_the_model_would(examples: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, output_router_logits=True))
    batch = padded(examples)
    losses = causal_lm(model, batch)
    assert set(losses) == {"nll", "aux"}
    assert_same(model, losses["nll"] + losses["aux"], model(**batch).loss)
    half = causal_lm(model, batch, num_items=2 * count(batch))
    assert half["aux"].item() == pytest.approx(losses["aux"].item() / 2)


def test_missing_labels_are_named(llama: nn.Module) -> None:
    with pytest.raises(DataError, match="needs 'labels' in the batch; did you mean 'label'"):
        causal_lm(llama, {"input_ids": torch.ones(1, 3).long(), "label": torch.ones(1, 3)})


def test_predictions_measure_the_corpus(llama: nn.Module, examples: list[Tensor]) -> None:
    objective = objectives.get("causal_lm")
    parts = [objective.predict(llama, padded(examples[:3])), objective.predict(llama, packed(examples[3:]))]
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert rows["tokens"].tolist() == [10, 3, 7, 5]
    assert not rows["nll"].requires_grad
    expected = nll(llama, padded(examples)).item()
    assert objective.measure(rows) == pytest.approx({"nll": expected, "perplexity": math.exp(expected)}, rel=1e-5)
    assert (objective.best, objective.higher_is_better) == ("nll", False)
