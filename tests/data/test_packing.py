"""Packing: no example is split or lost, none sees another, and models that cannot do that are refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import find_packed_sequence_indices

from pegbox.core.errors import DataError, ModelError
from pegbox.data.collate import PackedCollator, PadCollator
from pegbox.data.packing import pack, require_packing
from pegbox.data.tokenise import Encoded

V = 61
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, attention="sdpa"):
    torch.manual_seed(0)
    kwargs = {**SHAPE, "num_key_value_heads": 2, "attn_implementation": attention}
    gpt2 = {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_implementation": attention,
    }
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**kwargs)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**kwargs)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**kwargs, sliding_window=5)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
    }[name]()
    return model.eval()


def examples(count=11, longest=14, seed=0):
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        size = draw.randint(2, longest)
        ids = [draw.randrange(V) for _ in range(size)]
        rows.append(Encoded(ids, [t if j >= size // 2 else -100 for j, t in enumerate(ids)], str(i)))
    return rows


def examples_within(row):
    """The examples of a packed row, as it holds them."""
    starts = [i for i, position in enumerate(row.position_ids) if position == 0]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_every_example_is_in_one_row_whole_and_once():
    rows = {row.id: row for row in examples(200)}
    packing = pack(list(rows.values()), 20)
    seen = []
    for packed in packing.rows:
        assert len(packed) <= 20
        for id, where in zip(packed.ids, examples_within(packed), strict=True):
            assert list(packed.input_ids[where]) == list(rows[id].input_ids)
            assert list(packed.labels[where]) == [-100, *rows[id].labels[1:]]
            assert list(packed.position_ids[where]) == list(range(len(rows[id])))
            seen.append(id)
    assert sorted(seen) == sorted(rows)


def test_efficiency_is_told():
    packing = pack([Encoded([1] * n, [1] * n, str(n)) for n in (7, 3, 5, 4, 1)], 10)
    assert (len(packing.rows), packing.efficiency) == (2, 1.0)
    assert str(packing) == "5 examples in 2 rows of 10 tokens, 100.0% full"
    assert str(pack([], 10)) == "0 examples in 0 rows of 10 tokens, 0.0% full"
    assert pack(examples(500, longest=128), 256).efficiency > 0.98


def test_a_seed_decides_the_order_and_the_company():
    rows = examples(60)

    def order(seed):
        return [row.ids for row in pack(rows, 30, seed=seed).rows]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert {frozenset(ids) for ids in order(0)} != {frozenset(ids) for ids in order(1)}
    sizes = [len(row) for row in pack(rows, 30).rows]
    assert sizes != sorted(sizes, reverse=True)


def test_an_example_longer_than_a_row_is_refused_by_name():
    with pytest.raises(
        DataError, match="example 'a' has 9 tokens, more than a packed row's 8; encode with max_length=8"
    ):
        pack([Encoded([1] * 9, [1] * 9, "a")], 8)


# -- equal to the padded batch -------------------------------------------------------------------------------------


def loss_and_gradients(model, batch):
    """Summed cross-entropy of the shifted labels, and every parameter's gradient."""
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2"])
def test_packed_loss_and_gradients_are_those_of_the_padded_batch(name, attention):
    model = build(name, attention)
    rows = examples()
    loss, gradients = loss_and_gradients(model, PadCollator(0)(rows))
    packed = PackedCollator(0, pad_to_multiple_of=8)(pack(rows, 40).rows)
    assert (packed["labels"] != -100).sum() == sum(label != -100 for row in rows for label in row.labels[1:])
    packed_loss, packed_gradients = loss_and_gradients(model, packed)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-5, atol=1e-5)


def test_a_batch_tells_transformers_where_examples_begin():
    rows = pack(examples(), 40).rows
    positions = PackedCollator(0, pad_to_multiple_of=41)(rows)["position_ids"]
    found = find_packed_sequence_indices(positions)
    for row, segments in zip(rows, found, strict=True):
        expected = [i for i, where in enumerate(examples_within(row)) for _ in range(where.stop - where.start)]
        assert segments.tolist() == expected + [len(row.ids)] * (41 - len(row))


def test_one_example_a_row_is_the_example_alone():
    model = build("llama")
    rows = examples(2)
    loss, _ = loss_and_gradients(model, PadCollator(0)(rows))
    packed, _ = loss_and_gradients(model, PackedCollator(0)(pack(rows, 14).rows))
    torch.testing.assert_close(packed, loss)


def test_with_a_cache_examples_would_see_each_other():
    """Why a packed batch is run with `use_cache=False`: transformers looks for restarts only without a cache."""
    model = build("llama")
    batch = PackedCollator(0)(pack(examples(), 40).rows)
    del batch["labels"]
    apart, together = model(**batch, use_cache=False).logits, model(**batch, use_cache=True).logits
    assert (apart - together).abs().max() > 0.01


# -- who can ------------------------------------------------------------------------------------------------------


class IgnoresPositions(nn.Module):
    """GPT-2 but for its positions, which it counts by itself."""

    def __init__(self):
        super().__init__()
        self.inner = build("gpt2")

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, position_ids, use_cache):
        mask = torch.ones(len(position_ids[0]), len(position_ids[0])).tril().bool()
        segment = find_packed_sequence_indices(position_ids)
        if segment is not None:
            mask = mask & (segment[0][:, None] == segment[0][None])
        return self.inner(input_ids, attention_mask=mask[None, None], use_cache=use_cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2"])
def test_models_that_can(name, attention):
    require_packing(build(name, attention))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_can_still(dtype):
    require_packing(build("llama").to(dtype))


def bert():
    return BertForMaskedLM(BertConfig(**SHAPE))


def opt():
    shape = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=V, num_attention_heads=4, max_position_embeddings=64, **shape))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8))


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (bert, "BertForMaskedLM cannot be trained on packed rows: an example sees the tokens of the one before it"),
        (opt, "an example sees the tokens of the one before it"),
        (t5, "its forward does not run on input_ids and position_ids alone"),
        (IgnoresPositions, "positions do not restart with each example"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_cannot_are_refused_with_a_way_out(model, fault, dtype):
    built = model().to(dtype)
    with pytest.raises(ModelError, match=fault) as error:
        require_packing(built)
    assert "turn packing off" in str(error.value)
    assert "attn_implementation='sdpa'" in str(error.value)


def test_asking_leaves_the_model_as_it_was():
    model = build("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    require_packing(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
