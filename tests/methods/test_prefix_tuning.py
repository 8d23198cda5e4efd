"""Prefix tuning: counts, what queries see of the prefix, positions, PEFT's files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import pegbox
from pegbox import Stack
from pegbox.checks.lab import shake
from pegbox.checks.models import classified_text, images, text, translation
from pegbox.core.errors import AdapterError, ModelError, TargetError
from pegbox.core.files import CONFIG, TENSORS
from pegbox.methods.prefix_tuning import PROJECTION, PrefixTuning

from .tiny import family

BATCHES = {"llama": text, "gpt2": text, "bert": classified_text, "t5": translation, "vit": images}
WIDTHS = {"llama": 16, "gpt2": 32, "bert": 32, "t5": 32, "vit": 32}  # heads of keys times their dimension
ATTENTIONS = {"llama": 2, "gpt2": 2, "bert": 2, "t5": 4, "vit": 2}
KERNELS = ("sdpa", "eager")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT calls


def tuned_on(name: str, kernel: str = "sdpa", **settings: Any) -> Any:
    model = family(name)
    model.set_attn_implementation(kernel)
    return shake(pegbox.tune(model, "prefix_tuning", **({"tokens": 3} | settings)))


def caches(tuned: Any, layers: int, rows: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """What each layer's cache would begin with: (rows, heads, n, dim)."""
    pairs = [tuned.trainable()[f"shared.prefix_{i}"].unflatten(2, (heads, -1)) for i in range(layers)]
    by_head = [pair.permute(1, 2, 0, 3) for pair in pairs]  # (2, heads, n, dim)
    return [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in by_head]


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHES)
def test_parameters(name: str) -> None:
    """2 L n d_kv."""
    count = pegbox.tune(family(name), "prefix_tuning", tokens=5).count()[0]
    assert count == 2 * ATTENTIONS[name] * 5 * WIDTHS[name]


def test_parameters_of_a_projection() -> None:
    """E, W1, b1, W2, b2: n d + d h + h + h 2 L d + 2 L d."""
    count = pegbox.tune(family("gpt2"), "prefix_tuning", tokens=5, projection=True, hidden=7).count()[0]
    assert count == 5 * 32 + 32 * 7 + 7 + 7 * 2 * 2 * 32 + 2 * 2 * 32


def test_layers_and_targets_choose() -> None:
    assert pegbox.tune(family("llama"), "prefix_tuning", tokens=5, layers="1").count()[0] == 2 * 5 * 16
    crossed = pegbox.tune(family("t5"), "prefix_tuning", tokens=5, targets=("attn", "cross"))
    assert crossed.count()[0] == 2 * 6 * 5 * 32


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_reads_it_as_from_its_cache(name: str, kernel: str) -> None:
    base, tuned, batch = family(name), tuned_on(name, kernel), text(0)
    base.set_attn_implementation(kernel)
    cache = DynamicCache(caches(tuned, 2, 4, 2 if name == "llama" else 4))
    mask = torch.ones(4, 3 + 8, dtype=torch.long)
    want = base(input_ids=batch["input_ids"], attention_mask=mask, cache=cache, labels=batch["labels"])
    out = tuned(**batch)
    assert torch.allclose(out.logits, want.logits, atol=1e-5)
    assert torch.allclose(out.loss, want.loss, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_encoder_reads_it_as_from_a_cache(kernel: str) -> None:
    base, tuned, batch = family("bert"), tuned_on("bert", kernel), classified_text(0)
    base.set_attn_implementation(kernel)
    batch["attention_mask"][0, 5:] = 0
    mask = torch.cat([torch.ones(4, 3, dtype=torch.long), batch["attention_mask"]], dim=1)
    hidden = base.bert(input_ids=batch["input_ids"], attention_mask=mask, cache=DynamicCache(caches(tuned, 2, 4, 4)))
    assert torch.allclose(tuned(**batch).logits, base.classifier(hidden.pooler_output), atol=1e-5)


def test_an_encoder_decoder_reads_it_as_from_a_cache() -> None:
    base, tuned, batch = family("t5"), tuned_on("t5", stacks="decoder"), translation(0)
    cache = EncoderDecoderCache(DynamicCache(caches(tuned, 2, 4, 4)), DynamicCache())
    want = base(**batch, cache=cache, use_cache=True)
    assert torch.allclose(tuned(**batch).logits, want.logits, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["vit", "t5", "bert"])
def test_every_query_sees_the_pairs(name: str, kernel: str) -> None:
    """By hand, in an attention that no cache reaches: softmax(s q [P_k, K]^T) [P_v, V]."""
    tuned = tuned_on(name, kernel)
    path = next(iter(tuned.adapter().shared.survey.places))
    module = tuned.model.get_submodule(path)
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    out = module(x)[0]
    with tuned.disabled():
        assert torch.allclose(by_hand(name, module, x, None), module(x)[0], atol=1e-5), "the hand is wrong"
        want = by_hand(name, module, x, tuned.trainable()["shared.prefix_0"])
    assert out.shape == x.shape
    assert torch.allclose(out, want, atol=1e-5)


def by_hand(name: str, module: Any, x: Tensor, prefix: Tensor | None) -> Tensor:
    """(B, T, 32) -> (B, T, 32)."""
    inner = module.self if name == "bert" else module
    q, k, v = ({"vit": "q_proj k_proj v_proj", "t5": "q k v", "bert": "query key value"}[name]).split()
    queries, keys, values = (getattr(inner, word)(x) for word in (q, k, v))
    n = 0
    if prefix is not None:
        n = len(prefix)
        keys = torch.cat([prefix[:, 0].expand(len(x), -1, -1), keys], dim=1)
        values = torch.cat([prefix[:, 1].expand(len(x), -1, -1), values], dim=1)
    q_, k_, v_ = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in (queries, keys, values))
    scores = q_ @ k_.mT * (1.0 if name == "t5" else 8**-0.5)
    if name == "t5":
        scores = scores + module.compute_bias(x.shape[1], n + x.shape[1], past_seen_tokens=n)
    mixed = (scores.softmax(-1) @ v_).transpose(1, 2).flatten(2)
    if name == "bert":
        return module.output(mixed, x)  # type: ignore[no-any-return]
    return (module.o_proj if name == "vit" else module.o)(mixed)  # type: ignore[no-any-return]


def test_zeros_are_seen_too() -> None:
    """A prefix of zeros takes its share of every query's attention: not the base."""
    tuned = pegbox.tune(family("llama"), "prefix_tuning", tokens=3, start="zero")
    assert not any(p.any() for p in tuned.trainable().values())
    assert not torch.allclose(tuned(**text(0)).logits, family("llama")(**text(0)).logits, atol=1e-3)


@pytest.mark.parametrize("name", BATCHES)
def test_stacked_prefixes_follow_one_another(name: str) -> None:
    """Stack(a, b) reads [a, b, x]: one prefix of both."""
    tuned: Any = shake(pegbox.tune(family(name), "prefix_tuning", tokens=3, name="a"), 1)
    shake(tuned.add("b", PrefixTuning(tokens=2)), 2)
    both = pegbox.tune(family(name), "prefix_tuning", tokens=5)
    one, two = tuned.state("a"), tuned.state("b")
    both.load_state({key: torch.cat([one[key], two[key]]) for key in one})
    batch = BATCHES[name](0)
    assert torch.allclose(tuned.use(Stack("a", "b"))(**batch).logits, both(**batch).logits, atol=1e-5)


def test_a_projection_is_folded() -> None:
    """The pairs of a projection, trained as they are, give the same outputs."""
    tuned = tuned_on("llama", projection=True, hidden=5)
    folded = pegbox.tune(family("llama"), "prefix_tuning", tokens=3)
    state = {key.removeprefix("shared."): value for key, value in tuned.state().items()}
    parts = [part.unflatten(1, (2, 16)) for part in tuned.method.pack(state)["prefix"].chunk(2, dim=1)]
    folded.load_state({f"shared.prefix_{i}": part for i, part in enumerate(parts)})
    assert torch.allclose(folded(**text(0)).logits, tuned(**text(0)).logits, atol=1e-5)


# -- positions, padding, packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_changes_nothing(name: str, kernel: str, side: str) -> None:
    tuned, ids = tuned_on(name, kernel), text(0)["input_ids"]
    short = ids[:, :5]
    alone = tuned(input_ids=short).logits
    where = slice(3, 8) if side == "left" else slice(0, 5)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    padded[:, where], mask[:, where] = short, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = tuned(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(out[:, where], alone, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_padded_encoder_is_its_rows(kernel: str) -> None:
    tuned, batch = tuned_on("bert", kernel), classified_text(0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[:, 5:], mask[:, 5:] = 0, 0
    alone = tuned(input_ids=ids[:, :5]).logits
    assert torch.allclose(tuned(input_ids=ids, attention_mask=mask).logits, alone, atol=1e-5)


def test_a_table_that_is_too_short_is_told() -> None:
    tuned = pegbox.tune(family("gpt2"), "prefix_tuning", tokens=60)
    with pytest.raises(ModelError, match="64 positions"):
        tuned(**text(0))


# -- peers -------------------------------------------------------------------------------------------------------------


def peft_model(name: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    kind = {"t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=kind, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(family(name), config).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_projection_trains_as_pefts(name: str) -> None:
    """The same tensors give the same outputs and the same gradients, to 1e-5."""
    theirs = peft_model(name, prefix_projection=True, encoder_hidden_size=6)
    encoder = theirs.prompt_encoder["default"]
    tuned = tuned_on(name, projection=True, hidden=6)
    first, last = encoder.transform[0], encoder.transform[2]
    given = (encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias)
    pairs = dict(zip(PROJECTION, given, strict=True))
    tuned.load_state({f"shared.{key}": value.detach() for key, value in pairs.items()})
    ours, want = tuned(**text(0)), theirs(**text(0))
    assert torch.allclose(ours.logits, want.logits, atol=1e-5)
    ours.loss.backward()
    want.loss.backward()
    for key, value in pairs.items():
        assert torch.allclose(tuned.trainable()[f"shared.{key}"].grad, value.grad, atol=1e-5), key


def test_pefts_encoder_decoder_is_taken_apart(tmp_path: Path) -> None:
    """PEFT's layers share pairs; here each layer has its own, and the outputs are PEFT's."""
    theirs = peft_model("t5")
    theirs.save_pretrained(str(tmp_path))
    tuned = pegbox.load(family("t5"), tmp_path)
    assert tuned.method.stacks == "decoder"
    batch = translation(0)
    assert torch.allclose(tuned(**batch).logits, theirs(**batch).logits, atol=1e-5)


def test_an_encoder_decoders_file_is_ours(tmp_path: Path) -> None:
    """PEFT has no place for a prefix of each layer's own, so it is not told that it has."""
    tuned = tuned_on("t5")
    tuned.save(tmp_path)
    assert "peft_type" not in json.loads((tmp_path / CONFIG).read_text())
    again = pegbox.load(family("t5"), tmp_path)
    assert torch.equal(again(**translation(0)).logits, tuned(**translation(0)).logits)


def test_some_layers_alone_are_not_pefts(tmp_path: Path) -> None:
    tuned_on("llama", layers="1").save(tmp_path)
    assert "peft_type" not in json.loads((tmp_path / CONFIG).read_text())
    pegbox.load(family("llama"), tmp_path)


def test_a_projections_file_lacks_nothing(tmp_path: Path) -> None:
    """Training can go on from it, and PEFT finds the pairs in it; without them it is damaged."""
    from safetensors.torch import load_file, safe_open, save_file

    tuned_on("llama", projection=True).save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert set(tensors) == {"prompt_embeddings", *(f"shared.{k}" for k in PROJECTION)}
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        header = file.metadata()
    tensors.pop("prompt_embeddings")
    save_file(tensors, tmp_path / TENSORS, metadata=header)
    with pytest.raises(AdapterError, match="projection"):
        pegbox.load(family("llama"), tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Torchs(nn.Module):
    """An attention that calls none of its projections."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_attention_that_takes_no_more_keys_is_refused() -> None:
    with pytest.raises(TargetError):
        pegbox.tune(Torchs(), "prefix_tuning", tokens=3)


def test_the_decoder_of_a_decoder_is_refused() -> None:
    with pytest.raises(TargetError, match="stacks='decoder'"):
        pegbox.tune(family("llama"), "prefix_tuning", stacks="decoder")


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    tuned = pegbox.tune(family("vit"), "prefix_tuning", tokens=3)
    layer = tuned.model.get_submodule(next(iter(tuned.adapter().shared.survey.places)))
    with pytest.raises(ModelError, match="eager"):
        layer(torch.randn(1, 4, 32), attention_mask="causal")


def test_a_cross_attention_keeps_its_prefix_while_it_writes() -> None:
    tuned = tuned_on("t5", targets="cross")
    batch = translation(0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 5}
    with_cache = tuned.generate(**given, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, tuned.generate(**given, do_sample=False, use_cache=False))
    assert F.mse_loss(tuned(**batch).logits, family("t5")(**batch).logits) > 1e-6
