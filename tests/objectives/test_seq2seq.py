from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.trainer_pt_utils import LabelSmoother

import pegbox
from pegbox import objectives
from pegbox.core import headless
from pegbox.core.errors import DataError, ModelError
from pegbox.objectives.seq2seq import rouge_l

from .preferences import assert_same, gradients

V = 64


def t5(**changes: Any) -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes, **changes)
    )


def bart() -> BartForConditionalGeneration:
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=V, d_model=32, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=2,
            eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None, **sizes
        )
    )  # fmt: skip


MODELS = {"t5": t5, "t5 untied": lambda: t5(tie_word_embeddings=False), "bart": bart}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


def batch(seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, V, (rows, n), generator=draw) for n in (9, 6))
    mask = torch.ones_like(ids)
    mask[1, 6:], labels[1, 4:], labels[2, 2:] = 0, -100, -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def nll(model: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    items = options.pop("num_items", None)
    return objectives.get("seq2seq").given(options)(model, given, num_items=items)["nll"]


def test_loss_and_gradients_are_the_model_s_own(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = nll(model, batch()), model(**batch()).loss
    assert_same((ours, gradients(ours, model)), (theirs, gradients(theirs, model)))
    assert "full logits" not in caplog.text
    assert headless._proven[model] is not None  # the head was run in chunks


def test_no_logits_are_made(model: nn.Module) -> None:
    """Neither by the head nor by what BART adds to it: nothing of the vocabulary's width leaves the model."""
    nll(model, batch())  # proven
    shapes = []
    model.register_forward_hook(lambda _, args, output: shapes.append(output.logits.shape))
    nll(model, batch())
    assert [shape[-1] for shape in shapes] == [1]
    if isinstance(model, BartForConditionalGeneration):
        assert model.final_logits_bias.shape == (1, V)


def test_a_shift_of_the_logits_that_is_not_zero_is_kept() -> None:
    torch.manual_seed(0)
    model = bart()
    model.final_logits_bias.normal_()
    ours, theirs = nll(model, batch()), model(**batch()).loss
    assert_same((ours, gradients(ours, model)), (theirs, gradients(theirs, model)))


def test_label_smoothing_is_that_of_transformers(model: nn.Module) -> None:
    theirs = LabelSmoother(epsilon=0.1)(model(**batch()), batch()["labels"])
    ours = nll(model, batch(), label_smoothing=0.1)
    assert_same((ours, gradients(ours, model)), (theirs, gradients(theirs, model)))


def test_accumulated_micro_batches_equal_the_whole(model: nn.Module) -> None:
    objective, whole = objectives.get("seq2seq"), batch()
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    items = sum(objective.count(part) for part in parts)
    accumulated = sum(nll(model, part, num_items=items) for part in parts)
    whole_loss = nll(model, whole)
    assert isinstance(accumulated, Tensor)
    assert_same((accumulated, gradients(accumulated, model)), (whole_loss, gradients(whole_loss, model)))


@pytest.mark.parametrize("method", ["lora", "series"])
def test_tuned_models(model: nn.Module, method: str) -> None:
    tuned = pegbox.tune(model, method)
    loss = nll(tuned, batch())
    assert loss.item() == pytest.approx(model(**batch()).loss.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in tuned.trainable().values())


def test_metrics(model: nn.Module) -> None:
    objective = objectives.get("seq2seq").given({"generate": 8})
    parts = [objective.predict(model, batch(seed)) for seed in range(2)]
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert {key: len(value) for key, value in rows.items()} == dict.fromkeys(
        ("nll", "tokens", "exact_match", "rouge_l"), 8
    )
    measured = objective.measure(rows)
    assert 0 <= measured["exact_match"] <= measured["rouge_l"] <= 1
    plain = objectives.get("seq2seq").given({})
    assert set(plain.measure(plain.predict(model, batch()))) == {"nll", "perplexity"}


def test_what_is_generated_is_compared_with_the_target(model: nn.Module) -> None:
    given = batch()
    written = model.generate(
        given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=6, do_sample=False
    )
    given["labels"] = written[:, 1:].clone()
    measured = objectives.get("seq2seq").given({"generate": 6}).predict(model.eval(), given)
    assert measured["exact_match"].tolist() == [1.0] * 4
    assert measured["rouge_l"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("ours", "theirs", "f1"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 9, 3], [1, 2, 3, 4], 4 / 7), ([], [1], 0.0), ([], [], 1.0), ([5], [6], 0.0)],
)
def test_rouge_l(ours: list[int], theirs: list[int], f1: float) -> None:
    assert rouge_l(ours, theirs) == pytest.approx(f1)


def test_errors(llama: nn.Module) -> None:
    with pytest.raises(ModelError, match="a LlamaForCausalLM is none; use objective=sft"):
        nll(llama, batch())
    with pytest.raises(DataError, match="seq2seq needs 'labels'"):
        nll(t5(), {"input_ids": torch.ones(1, 3).long()})
