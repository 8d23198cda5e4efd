"""P-tuning: counts, the encoder, PEFT's files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import text, translation
from pegbox.core.errors import ModelError

from .tiny import family

ENCODERS = ("mlp", "lstm")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT calls


def tuned_on(name: str, encoder: str, **settings: Any) -> Any:
    return shake(pegbox.tune(family(name), "p_tuning", encoder=encoder, **({"tokens": 3, "hidden": 6} | settings)))


def peft_model(name: str, encoder: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    kind = {"t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    given = {"encoder_reparameterization_type": encoder.upper(), "encoder_hidden_size": 6} | settings
    config = peft.PromptEncoderConfig(num_virtual_tokens=3, task_type=kind, **given)
    return peft.get_peft_model(family(name), config).eval()


def theirs_as_ours(encoder: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's tensors by the names of ours."""
    lstm = dict(encoder.lstm_head.named_parameters()) if hasattr(encoder, "lstm_head") else {}
    linears = [m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)]
    mlp = {f"mlp_{name}_{i}": p for i, m in enumerate(linears) for name, p in m.named_parameters()}
    named = {"embedding": encoder.embedding.weight} | {f"lstm_{name}": p for name, p in lstm.items()} | mlp
    return {f"shared.{name}": p for name, p in named.items()}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_is_the_prompt_that_its_encoder_gives(encoder: str) -> None:
    """The same outputs as prompt tuning with f(E)."""
    tuned = tuned_on("llama", encoder)
    prompt = pegbox.tune(family("llama"), "prompt_tuning", tokens=3)
    prompt.load_state({"shared.prompt": tuned.adapter().shared.embed(torch.empty(0)).detach()})
    assert torch.allclose(tuned(**text(0)).logits, prompt(**text(0)).logits, atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_trains_as_pefts(encoder: str) -> None:
    """The same tensors give the same outputs and the same gradients, to 1e-5."""
    theirs = peft_model("llama", encoder)
    tuned = tuned_on("llama", encoder)
    pairs = theirs_as_ours(theirs.prompt_encoder["default"])
    tuned.load_state({key: value.detach() for key, value in pairs.items()})
    ours, want = tuned(**text(0)), theirs(**text(0))
    assert torch.allclose(ours.logits, want.logits[:, 3:], atol=1e-5)
    ours.loss.backward()
    want.loss.backward()
    for key, value in pairs.items():
        assert torch.allclose(tuned.trainable()[key].grad, value.grad, atol=1e-5), key


def test_the_layers_of_the_lstm_drop() -> None:
    tuned = tuned_on("llama", "lstm", lstm_dropout=0.5).eval()
    calm = tuned(**text(0)).logits
    assert torch.equal(tuned(**text(0)).logits, calm)
    assert not torch.allclose(tuned.train()(**text(0)).logits, calm, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_file_goes_on_here_and_is_read_there(encoder: str, tmp_path: Path) -> None:
    """Ours holds the encoder and the prompt that it gives, which is what PEFT reads."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tuned = tuned_on("llama", encoder)
    tuned.save(tmp_path)
    again = pegbox.load(family("llama"), tmp_path)
    assert again.trainable().keys() == tuned.trainable().keys()
    assert torch.equal(again(**text(0)).logits, tuned(**text(0)).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(family("llama"), str(tmp_path)).eval()
    assert torch.allclose(theirs(**text(0)).logits[:, 3:], tuned(**text(0)).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_pefts_file_has_no_encoder(name: str, encoder: str, tmp_path: Path) -> None:
    """It loads as the prompt that the encoder gave; of an encoder-decoder's two halves the one that PEFT reads."""
    theirs = peft_model(name, encoder)
    theirs.save_pretrained(str(tmp_path))
    tuned = pegbox.load(family(name), tmp_path)
    assert tuned.method.encoder == "none"
    batch = translation(0) if name == "t5" else text(0)
    assert torch.allclose(
        tuned(**batch).logits, theirs(**batch).logits[:, -tuned(**batch).logits.shape[1] :], atol=1e-5
    )


def test_packed_rows_are_refused() -> None:
    tuned = tuned_on("llama", "mlp")
    packed = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(4, -1)
    with pytest.raises(ModelError, match="packed"):
        tuned(input_ids=text(0)["input_ids"], position_ids=packed)
