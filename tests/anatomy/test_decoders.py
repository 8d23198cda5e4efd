"""Each decoder that has a data file, trained on packed rows and without ever making all its logits.

A packed batch gives what the padded one gives, and a loss through the head what full logits give, or the model is
refused; soft caps, sliding windows, scaled embeddings, experts and partial rotations all have to come through.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.cross_entropy import LogitRule
from pegbox.core.errors import ModelError
from pegbox.core.headless import logit_rule, through_head
from pegbox.data.collate import PackedCollator, PadCollator
from pegbox.data.packing import pack, require_packing
from pegbox.data.tokenise import Encoded

from .batches import inputs
from .tiny import tiny

LONG_ROPE = {  # beyond 16 positions other factors hold; no example here is as long
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "max_position_embeddings": 64,
}
DECODERS: dict[str, tuple[str, str, dict[str, Any], LogitRule]] = {
    "gemma": ("gemma", "GemmaForCausalLM", {}, LogitRule()),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", {"final_logit_softcapping": 2.0}, LogitRule(softcap=2.0)),
    "gemma2 without caps": (
        "gemma2",
        "Gemma2ForCausalLM",
        {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        LogitRule(),
    ),
    "gemma3_text": ("gemma3_text", "Gemma3ForCausalLM", {}, LogitRule()),
    "gemma3_text with a cap": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
        LogitRule(softcap=2.0),
    ),
    "phi": ("phi", "PhiForCausalLM", {}, LogitRule()),
    "phi3": ("phi3", "Phi3ForCausalLM", {"sliding_window": 4}, LogitRule()),
    "phi3 with long rope": ("phi3", "Phi3ForCausalLM", LONG_ROPE, LogitRule()),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {}, LogitRule()),
    "gpt_neox side by side": ("gpt_neox", "GPTNeoXForCausalLM", {"use_parallel_residual": False}, LogitRule()),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"sliding_window": 4}, LogitRule()),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}, LogitRule()),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", {}, LogitRule()),
}
EAGER_ONLY = {"gemma2", "gemma2 without caps"}  # torch's fused attention has no soft cap


@pytest.fixture(params=DECODERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def decoder(name: str, attention: str | None = None) -> nn.Module:
    kind, cls, settings, _ = DECODERS[name]
    chosen = {"attn_implementation": attention} if attention else {}
    return tiny(kind, cls, initializer_range=0.1, **settings, **chosen)  # logits large enough for a cap to show


def examples(count: int = 9) -> list[Encoded]:
    draw = random.Random(0)
    rows = []
    for i in range(count):
        ids = [draw.randrange(3, 50) for _ in range(draw.randint(2, 13))]
        rows.append(Encoded(ids, [t if j >= len(ids) // 2 else -100 for j, t in enumerate(ids)], str(i)))
    return rows


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed cross-entropy of the shifted labels, and every parameter's gradient."""
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(name: str, attention: str) -> None:
    if attention == "sdpa" and name in EAGER_ONLY:
        with pytest.raises(ValueError, match="does not support"):
            decoder(name, attention)
        return
    model = decoder(name, attention)
    require_packing(model)
    rows = examples()
    loss, gradients = loss_and_gradients(model, PadCollator(0)(rows))
    packed_loss, packed = loss_and_gradients(model, PackedCollator(0, pad_to_multiple_of=8)(pack(rows, 40).rows))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, gradients, rtol=1e-5, atol=1e-5)


def test_loss_through_the_head_equals_that_of_full_logits(name: str) -> None:
    model = decoder(name)
    batch = PadCollator(0)(examples())
    assert logit_rule(model, batch) == DECODERS[name][-1]
    want, gradients = loss_and_gradients(model, dict(batch))
    labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    have, _ = through_head(
        model, batch, labels.shape[1], lambda head, hidden: head.cross_entropy(hidden, labels, reduction="sum")
    )
    have.backward()
    torch.testing.assert_close(have.detach(), want, rtol=1e-5, atol=1e-5)
    through = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.testing.assert_close(through, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "cls", "fault"),
    [
        ("bart", "BartForConditionalGeneration", "an example sees the tokens of the one before it"),
        ("whisper", "WhisperForConditionalGeneration", "its forward does not run on input_ids and position_ids alone"),
        ("deberta-v2", "DebertaV2ForMaskedLM", "an example sees the tokens of the one before it"),
        ("distilbert", "DistilBertForMaskedLM", "an example sees the tokens of the one before it"),
    ],
)
def test_others_are_refused_with_a_way_out(kind: str, cls: str, fault: str) -> None:
    with pytest.raises(ModelError, match=fault) as refusal:
        require_packing(tiny(kind, cls))
    assert "turn packing off" in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "cls"), [("llava", "LlavaForConditionalGeneration"), ("gemma3", "Gemma3ForConditionalGeneration")]
)
def test_vision_language_models_pack_text(kind: str, cls: str) -> None:
    require_packing(tiny(kind, cls))


def test_a_head_that_only_looks_like_one_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    """The new DeBERTa heads call a layer before the logits their output embedding."""
    model = tiny("deberta-v2", "DebertaV2ForMaskedLM", legacy=False)
    assert logit_rule(model, inputs(model)) is None
    assert "trained from full logits" in caplog.text
