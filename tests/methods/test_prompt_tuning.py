"""Prompt tuning: counts, starts, and what the base sees of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pegbox
from pegbox import Stack
from pegbox.checks.lab import shake
from pegbox.checks.models import classified_text, text, translation
from pegbox.core.errors import ModelError
from pegbox.methods.prompt_tuning import PromptTuning

from .tiny import family

BATCHES = {"llama": text, "gpt2": text, "bert": classified_text, "t5": translation}


@pytest.mark.parametrize("name", BATCHES)
def test_parameters(name: str) -> None:
    """n d: 20 x 1024 numbers for a width of 1024."""
    assert pegbox.tune(family(name), "prompt_tuning", tokens=5).count()[0] == 5 * 32


def test_the_start_is_of_the_vocabulary() -> None:
    model = family("llama")
    prompt = pegbox.tune(model, "prompt_tuning", tokens=5).trainable()["shared.prompt"]
    table = model.get_input_embeddings().weight
    assert all((row == table).all(dim=1).any() for row in prompt)


def gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = GemmaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    return GemmaForCausalLM(config).eval()


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=60, d_model=32, scale_embedding=True, **sides, **heads)
    ).eval()


@pytest.mark.parametrize(("build", "path"), [(gemma, "model.embed_tokens"), (bart, "model.encoder.embed_tokens")])
def test_the_start_is_scaled_as_the_models_own_embeddings(build: Any, path: str) -> None:
    model = build()
    embed = model.get_submodule(path)
    with torch.no_grad():
        scaled = embed(torch.arange(60))
    assert not torch.allclose(scaled, embed.weight)
    tuned = shake(pegbox.tune(model, "lora", targets="embed", rank=2, name="other"))
    tuned.add("default", PromptTuning(tokens=5))  # starts from the base's embeddings, whatever is put around them
    prompt = tuned.trainable()["shared.prompt"]
    assert all((row == scaled).all(dim=1).any() for row in prompt)


def test_the_random_start_is_normal() -> None:
    prompt = pegbox.tune(family("llama"), "prompt_tuning", tokens=60, start="random").trainable()["shared.prompt"]
    assert prompt.std().item() == pytest.approx(1, rel=0.1)


def test_the_model_reads_the_prompt_before_the_input() -> None:
    """The same as giving [p, e(x)] to the base as `inputs_embeds`."""
    base, batch = family("llama"), text(0)
    tuned = shake(pegbox.tune(family("llama"), "prompt_tuning", tokens=3))
    embedded = base.get_input_embeddings()(batch["input_ids"])
    prompt = tuned.trainable()["shared.prompt"].expand(len(embedded), -1, -1)
    want = base(inputs_embeds=torch.cat([prompt, embedded], dim=1)).logits[:, 3:]
    out = tuned(**batch)
    assert torch.allclose(out.logits, want, atol=1e-5)
    shifted = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    # the first token of the input is predicted too, from the prompt's last
    first = base(inputs_embeds=torch.cat([prompt, embedded], dim=1)).logits[:, 2]
    total = shifted * 7 + torch.nn.functional.cross_entropy(first, batch["labels"][:, 0])
    assert torch.allclose(out.loss, total / 8, atol=1e-5)


def test_an_encoder_decoder_reads_it_in_the_encoder() -> None:
    base, batch = family("t5"), translation(0)
    tuned = shake(pegbox.tune(family("t5"), "prompt_tuning", tokens=3))
    embedded = base.encoder.embed_tokens(batch["input_ids"])
    prompt = tuned.trainable()["shared.prompt"].expand(len(embedded), -1, -1)
    mask = torch.ones(len(embedded), 3 + embedded.shape[1], dtype=torch.long)
    want = base(
        inputs_embeds=torch.cat([prompt, embedded], dim=1),
        attention_mask=mask,
        decoder_input_ids=batch["decoder_input_ids"],
    )
    out = tuned(**batch)
    assert torch.allclose(out.logits, want.logits, atol=1e-5)
    assert out.encoder_last_hidden_state.shape == embedded.shape


@pytest.mark.parametrize("name", BATCHES)
def test_stacked_prompts_follow_one_another(name: str) -> None:
    """Stack(a, b) reads [a, b, x]: one prompt of both."""
    tuned: Any = shake(pegbox.tune(family(name), "prompt_tuning", tokens=3, name="a"), 1)
    shake(tuned.add("b", PromptTuning(tokens=2)), 2)
    both = pegbox.tune(family(name), "prompt_tuning", tokens=5)
    one, two = tuned.state("a")["shared.prompt"], tuned.state("b")["shared.prompt"]
    both.load_state({"shared.prompt": torch.cat([one, two])})
    batch = BATCHES[name](0)
    assert torch.allclose(tuned.use(Stack("a", "b"))(**batch).logits, both(**batch).logits, atol=1e-5)


def test_positions_that_are_given_are_moved_on() -> None:
    tuned = shake(pegbox.tune(family("llama"), "prompt_tuning", tokens=3))
    batch = text(0)
    positions = torch.arange(8).expand(4, -1)
    assert torch.allclose(tuned(**batch, position_ids=positions).logits, tuned(**batch).logits, atol=1e-6)


def test_packed_rows_and_ready_embeddings_are_refused() -> None:
    tuned = pegbox.tune(family("llama"), "prompt_tuning", tokens=3)
    ids = text(0)["input_ids"]
    packed = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(4, -1)
    with pytest.raises(ModelError, match="packed"):
        tuned(input_ids=ids, position_ids=packed)
    with pytest.raises(ModelError, match="input_ids"):
        tuned(inputs_embeds=torch.randn(4, 8, 32))


def test_an_error_on_the_way_leaves_nothing_behind() -> None:
    """The embedding alone is the base's, also after a forward that failed."""
    tuned = shake(pegbox.tune(family("llama"), "prompt_tuning", tokens=3))
    ids = text(0)["input_ids"]
    with pytest.raises(Exception):  # noqa: B017  (whatever torch raises for an id out of range)
        tuned(input_ids=ids + 1000)
    embed = tuned.get_input_embeddings()
    assert torch.equal(embed(ids), embed.weight[ids])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT calls
def test_pefts_prompt_for_scaled_embeddings_is_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    theirs = peft.get_peft_model(gemma(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    tuned, batch = pegbox.load(gemma(), tmp_path), text(0)
    assert torch.allclose(tuned(**batch).logits, theirs(**batch).logits[:, 3:], atol=1e-5)


@pytest.mark.parametrize("start", ["RANDOM", "SAMPLE_VOCAB"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT calls
def test_pefts_prompt_for_an_encoder_decoder_is_the_encoders_half(start: str, tmp_path: Path) -> None:
    """PEFT keeps as many tokens for the decoder, and never reads them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", prompt_tuning_init=start)
    theirs = peft.get_peft_model(family("t5"), config).eval()
    assert theirs.prompt_encoder["default"].embedding.weight.shape == (6, 32)
    theirs.save_pretrained(str(tmp_path))
    tuned, batch = pegbox.load(family("t5"), tmp_path), translation(0)
    assert tuned.count()[0] == 3 * 32
    assert torch.allclose(tuned(**batch).logits, theirs(**batch).logits, atol=1e-5)
