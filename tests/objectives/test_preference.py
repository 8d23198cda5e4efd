"""What holds of every preference objective: packed as padded, in parts as whole, the reference, and its errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import pegbox
from pegbox import objectives
from pegbox.core.errors import DataError, MethodError, ModelError, SettingsError
from pegbox.objectives.dpo import DPO
from pegbox.objectives.dpo import pair_losses as dpo_losses
from pegbox.objectives.preference import log1mexp

from .preferences import answers, assert_same, gradients, packed, padded

PAIRED = ("dpo", "ipo", "orpo", "simpo")


def tuned(model: nn.Module, method: str = "lora", **settings: Any) -> Any:
    made = pegbox.tune(model, method, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in made.trainable().values():
            p.add_(0.1 * torch.randn_like(p))
    return made


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("name", PAIRED)
def test_packed_pairs_are_as_padded_ones(model: nn.Module, name: str) -> None:
    """Loss, gradients and predictions; the padding at the end of a packed row counts for nothing."""
    made = tuned(model, rank=4)
    objective = objectives.get(name).given({})
    loose, tight = (total(objective(made, make(answers()))) for make in (padded, packed))
    assert_same((tight, gradients(tight, made)), (loose, gradients(loose, made)))
    a, b = (objective.predict(made, make(answers())) for make in (padded, packed))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.count(packed(answers())), objective.count(padded(answers())))


@pytest.mark.parametrize("name", [*PAIRED, "reward"])
def test_accumulated_micro_batches_equal_the_whole(llama: nn.Module, name: str) -> None:
    if name == "reward":
        from transformers import LlamaForSequenceClassification

        llama = LlamaForSequenceClassification(
            copy.deepcopy(llama.config).__class__(**llama.config.to_dict() | {"num_labels": 1})
        )
    made, pairs = tuned(llama, rank=4), answers()
    objective = objectives.get(name).given({})
    parts = [padded(pairs[:2]), padded(pairs[2:])]
    items = torch.stack([objective.count(part) for part in parts]).sum(0)
    accumulated = sum(total(objective(made, part, num_items=items)) for part in parts)
    whole = total(objective(made, padded(pairs)))
    assert isinstance(accumulated, Tensor)
    assert_same((accumulated, gradients(accumulated, made)), (whole, gradients(whole, made)))


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_the_reference_is_the_disabled_adapter(llama: nn.Module, name: str) -> None:
    """As a copy of the base, as log-probabilities computed before, and with the same gradients; dropout or not."""
    base = copy.deepcopy(llama)
    made = tuned(llama, rank=4)
    batch = padded(answers())
    objective = objectives.get(name)
    disabled = total(objective.given({})(made, batch))
    copied = total(objective.given({}, reference=base)(made, batch))
    from pegbox.objectives.answers import score

    known = {**batch, "reference_log_probs": score(base, batch)[0].sums.detach()}
    precomputed = total(objective.given({})(made, known))
    expected = disabled, gradients(disabled, made)
    for loss in (copied, precomputed):
        assert_same((loss, gradients(loss, made)), expected)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("name", PAIRED)
def test_no_logits_are_made(llama: nn.Module, name: str) -> None:
    """Neither of the model nor of its reference: nothing of the vocabulary's width leaves it."""
    made, objective = tuned(llama, rank=4), objectives.get(name).given({})
    objective(made, padded(answers()))  # proves the head
    widths = []
    llama.register_forward_hook(lambda _, args, output: widths.append(output.logits.shape[-1]))
    total(objective(made, padded(answers()))).backward()
    assert widths == [1] * (2 if objective.refers else 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that older transformers know
def test_gradient_checkpointing_does_not_reach_the_reference(llama: LlamaForCausalLM) -> None:
    made, objective = tuned(llama, rank=4), objectives.get("dpo").given({})
    plain = total(objective(made, padded(answers())))
    expected = plain, gradients(plain, made)
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = total(objective(made.train(), padded(answers())))
    assert_same((again, gradients(again, made)), expected)


def test_the_reference_drops_nothing_out(llama: LlamaForCausalLM) -> None:
    made, objective = tuned(llama, rank=4, dropout=0.5), objectives.get("dpo").given({})
    llama.config.attention_dropout = 0.5
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    from pegbox.objectives.answers import reference_log_probs

    batch = padded(answers())
    first, second = (reference_log_probs(made.train(), batch, None, "dpo") for _ in range(2))
    assert torch.equal(first, second)
    assert made.training
    assert llama.model.layers[0].training
    one, other = (total(objective(made, batch)).item() for _ in range(2))
    assert one != other


def test_an_untrained_adapter_prefers_nothing(llama: nn.Module) -> None:
    made = pegbox.tune(llama, "lora", rank=4)
    objective = objectives.get("dpo").given({})
    assert total(objective(made, padded(answers()))).item() == pytest.approx(math.log(2))
    measured = objective.measure(objective.predict(made, padded(answers())))
    assert measured["reward_margin"] == pytest.approx(0, abs=1e-6)


def test_conservative_dpo() -> None:
    margin = torch.tensor([-3.0, 0.0, 2.0])
    expected = -0.8 * F.logsigmoid(0.5 * margin) - 0.2 * F.logsigmoid(-0.5 * margin)
    torch.testing.assert_close(dpo_losses(margin, DPO(beta=0.5, label_smoothing=0.2)), expected)


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-6, -0.1, -0.7, -5.0, -40.0], dtype=torch.float32, requires_grad=True)
    exact = torch.log(-torch.expm1(x.detach().double()))
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=1e-6, atol=1e-16)
    (slope,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(slope.double(), -1 / torch.expm1(-x.detach().double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_a_method_that_trains_the_base_has_no_reference(llama: LlamaForCausalLM, name: str) -> None:
    base = copy.deepcopy(llama)
    made = pegbox.tune(llama, "full")
    batch = padded(answers())
    if name == "kto":
        batch |= {"desirable": torch.ones(6)} | {f"mismatched_{k}": v for k, v in padded(answers(2)).items()}
    with pytest.raises(
        MethodError, match=r"full trains the base's own tensors.*objective.precompute=true.*'reference'"
    ):
        objectives.get(name).given({})(made, batch)
    total(objectives.get(name).given({}, reference=base)(made, batch)).backward()
    assert llama.model.embed_tokens.weight.grad is not None
    with pytest.raises(ModelError, match="has no adapter"):
        objectives.get(name).given({})(base, batch)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("dpo", {"bta": 0.1}, "objective dpo has no setting 'bta'; did you mean 'beta'"),
        ("dpo", {"beta": 0}, r"objective dpo.beta must be above 0"),
        ("dpo", {"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing is for loss=sigmoid"),
        ("dpo", {"label_smoothing": 0.5}, "must be below 0.5"),
        ("kto", {"label_smoothing": 0.1}, "objective kto has no setting 'label_smoothing'"),
        ("sft", {"beta": 0.1}, "objective sft has no settings of its own, got 'beta'"),
    ],
)
def test_wrong_settings(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        objectives.get(name).given(values)


def test_a_reference_where_none_is_compared_with(llama: nn.Module) -> None:
    with pytest.raises(SettingsError, match="simpo compares with no reference"):
        objectives.get("simpo").given({}, reference=llama)


def test_settings_given_twice_add_up() -> None:
    found = objectives.get("dpo").given({"beta": 0.7}).given({"label_smoothing": 0.1})
    assert found.options == DPO(beta=0.7, label_smoothing=0.1)


def test_an_odd_number_of_answers(llama: nn.Module) -> None:
    batch = {key: value[:5] for key, value in padded(answers()).items()}
    with pytest.raises(DataError, match="holds 5 answers"):
        objectives.get("simpo").count(batch)


def test_kto_needs_mismatched_answers(llama: nn.Module) -> None:
    made = pegbox.tune(llama, "lora", rank=4)
    with pytest.raises(DataError, match="kto needs 'mismatched_input_ids'"):
        objectives.get("kto").given({})(made, padded(answers()) | {"desirable": torch.ones(6)})


def test_a_reward_is_one_number(llama: nn.Module) -> None:
    with pytest.raises(DataError, match="load it with 1 label"):
        objectives.get("reward").given({})(llama, padded(answers()))
    with pytest.raises(DataError, match="a packed row holds several answers"):
        objectives.get("reward").given({})(llama, packed(answers()))
