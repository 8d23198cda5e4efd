"""Files of classifiers, with prompts above all: PEFT's keys of the trained head, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import require_close, require_different, shake
from pegbox.checks.models import FAMILIES, inputs

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

METHODS = ("lora", "prompt_tuning", "p_tuning", "peft:vera", "peft:prompt_tuning", "peft:p_tuning")
TOKENS = {"tokens": 3}
SIZES = {"lora": {"rank": 4}, "peft:vera": {"rank": 4}, "peft:p_tuning": TOKENS | {"encoder_hidden_size": 8}}


def _model(family: str) -> tuple[nn.Module, str]:
    """A classifier, and the path of its head."""
    torch.manual_seed(0)
    if family == "bert":
        return FAMILIES["bert"].build().eval(), "classifier"
    from transformers import LlamaForSequenceClassification

    config: Any = FAMILIES["llama"].build().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval(), "score"


@torch.no_grad()
def _output(model: Any) -> Tensor:
    logits: Tensor = model(**inputs(FAMILIES["bert"].batch(0))).logits
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_peft_loads_the_head(method: str, family: str, tmp_path: Path) -> None:
    model, head = _model(family)
    tuned = shake(pegbox.tune(model, method, also_train=(head,), **SIZES.get(method, TOKENS))).eval()
    want = _output(tuned)
    tuned.save(tmp_path)
    require_close(_output(pegbox.load(_model(family)[0], tmp_path)), want, "read again")
    theirs = peft.PeftModel.from_pretrained(_model(family)[0], str(tmp_path)).eval()
    require_close(_output(theirs), want, "read by PEFT")


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("PromptTuningConfig", "bert"),
        ("PromptTuningConfig", "llama"),
        ("PromptEncoderConfig", "bert"),
    ],
)
def test_pefts_head_loads(kind: str, family: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = peft.get_peft_model(_model(family)[0], config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path))
    require_different(_output(theirs), _output(_model(family)[0]), "PEFT's adapter")
    require_close(_output(pegbox.load(_model(family)[0], tmp_path)), _output(theirs), "PEFT's adapter here")
