"""Every method of the registry on every architecture: it trains, or says in plain words why it cannot.

Each model is built once; a method is put on it, run forwards and backwards on two rows, and taken off.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from pegbox import anatomy, methods
from pegbox.checks import Case
from pegbox.checks.lab import shake
from pegbox.core.errors import PegboxError
from pegbox.core.method import Method
from pegbox.core.tuned import Tuned

from .batches import inputs, number
from .tiny import tiny

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "distilbert": "DistilBertForSequenceClassification",
    "deberta": "DebertaForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "bart": "BartForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "swin": "SwinForImageClassification",
    "clip": "CLIPModel",
    "llava": "LlavaForConditionalGeneration",
}
EVERYWHERE = ("lora", "dora", "miss", "bat", "full")  # what no architecture may refuse
NO_BIASES = {"gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"}
TOKENS = set(ARCHITECTURES) - {"whisper", "swin"}

# What a refusal says where an architecture lacks what `traits.needs` names.
LACKS = {"bias": ("bias",), "token ids": ("input_ids", "Embedding")}


@cache
def built(kind: str) -> nn.Module:
    return tiny(kind, ARCHITECTURES[kind], **({"qk_layernorm": True} if kind == "phi" else {}))


@cache
def unreached(kind: str) -> frozenset[str]:
    """Parameters on which the model's answers do not bear, and so no gradient reaches."""
    model = built(kind)
    number(model(**inputs(model))).backward()
    names = [name for name, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    return frozenset(names)


PAIRS = [pytest.param(name, kind, id=f"{name}-{kind}") for name, kind in product(methods.names(), ARCHITECTURES)]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_trains_or_says_why_not(name: str, kind: str) -> None:
    method, model = Case(name).built(), built(kind)
    lacking, batch, nothing = missing(method, kind), inputs(model), unreached(kind)
    tuned, refusal = put_on(model, method)
    if tuned is None:
        assert name not in EVERYWHERE, refusal
        words = LACKS[lacking] if lacking else (*anatomy.ROLES, *(path for path, _ in model.named_modules() if path))
        assert any(word in refusal for word in words), f"the refusal names no reason: {refusal}"
        assert_bare(model)
        return
    try:
        assert not lacking, f"{name} needs {lacking}, which {kind} lacks, and was put on it"
        train_once(tuned, batch, nothing)
    finally:
        tuned.detach()
        model.zero_grad()
    assert_bare(model)


def put_on(model: nn.Module, method: Method) -> tuple[Tuned | None, str]:
    """The tuned model, or None and what the refusal says."""
    try:
        return Tuned(model, anatomy.of(model), method), ""
    except PegboxError as refusal:
        return None, str(refusal)


def missing(method: Method, kind: str) -> str | None:
    """What the method needs and the architecture lacks."""
    lacks = {"bias": kind in NO_BIASES, "token ids": kind not in TOKENS}
    return next((need for need in method.traits.needs if lacks.get(need)), None)


def train_once(tuned: Tuned, batch: dict[str, torch.Tensor], nothing: frozenset[str]) -> None:
    shake(tuned.train())
    loss = number(tuned(**batch)) + tuned.penalty()
    assert math.isfinite(loss.item())
    loss.backward()
    trainable = tuned.trainable()
    assert trainable
    bare = [key for key, p in trainable.items() if p.grad is None and not out_of_reach(key, nothing)]
    assert bare == [], "no gradient reaches these"
    wrong = [key for key, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
    assert wrong == [], "gradients of these are not finite"
    moved = sum(bool(p.grad is not None and p.grad.any()) for p in trainable.values())
    assert moved >= 0.5 * len(trainable), "gradients are zero"  # of some they are: units that rest, experts not chosen


def out_of_reach(key: str, nothing: frozenset[str]) -> bool:
    """Whether a state key (`graft.PATH.NAME`, `base.NAME`) belongs to a module that nothing depends on."""
    path = key.partition(".")[2]
    return any(path.startswith(f"{name.rpartition('.')[0]}.") for name in nothing)


def assert_bare(model: nn.Module) -> None:
    """No graft is left on it, and all of it asks for gradients as before."""
    assert [path for path, module in model.named_modules() if "forward" in module.__dict__] == []
