from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pegbox.core.errors import SettingsError
from pegbox.pretrain.entropy import answer_entropy, select

from . import small_base

TOKENIZER = small_base.tokenizer()


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_base.model()


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, messages: list[dict[str, str]], *, left: int = 0) -> float:
    """Word by word, each from a forward of its own; `left` tokens of padding before."""
    ids: list[int] = []
    values = []
    for turn in messages:
        ids += TOKENIZER(f"<|{turn['role']}|>", add_special_tokens=False)["input_ids"]
        for token in TOKENIZER(turn["content"], add_special_tokens=False)["input_ids"]:
            if turn["role"] == "assistant":
                row = torch.tensor([[TOKENIZER.pad_token_id] * left + ids])
                mask = torch.tensor([[0] * left + [1] * len(ids)])
                places = (mask.cumsum(1) - 1).clamp(min=0)
                logits = model(input_ids=row, attention_mask=mask, position_ids=places).logits[0, -1]
                values.append(-logits.log_softmax(-1)[token].item())
            ids.append(token)
        ids += TOKENIZER("<|end|>", add_special_tokens=False)["input_ids"]
    return sum(values) / len(values)


def test_it_is_the_mean_over_the_assistants_words_however_rows_are_padded_and_batched(base: LlamaForCausalLM) -> None:
    rows = small_base.chats()
    values = answer_entropy(base, TOKENIZER, rows, batch_size=5)
    expected = [by_hand(base, row["messages"], left=k % 3) for k, row in enumerate(rows)]
    assert values == pytest.approx(expected, abs=1e-5)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    alone = answer_entropy(base, TOKENIZER, [rows[k] for k in order], batch_size=1)
    assert alone == pytest.approx([values[k] for k in order], abs=1e-5)


def test_a_head_of_zeros_finds_every_answer_as_surprising(base: LlamaForCausalLM) -> None:
    blank = small_base.model()
    torch.nn.init.zeros_(blank.lm_head.weight)
    values = answer_entropy(blank, TOKENIZER, small_base.chats())
    assert values == pytest.approx([math.log(len(TOKENIZER))] * 12, abs=1e-5)


def test_what_is_learned_by_heart_comes_lowest() -> None:
    model, rows = small_base.model(), small_base.chats(6)
    text = TOKENIZER.apply_chat_template(rows[4]["messages"], tokenize=False)
    ids = torch.tensor([TOKENIZER(text, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    other = {"id": "x", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Zebra 71!"}]}
    values = answer_entropy(model, TOKENIZER, [other, rows[4]])
    assert values[1] < values[0]


def test_an_example_without_an_answer_has_none(base: LlamaForCausalLM) -> None:
    empty: dict[str, Any] = {"id": "e", "messages": [{"role": "user", "content": "?"}]}
    values = answer_entropy(base, TOKENIZER, [empty, *small_base.chats(2)])
    assert math.isnan(values[0])
    assert 0 not in select(values, "all")


def test_bands_hold_the_share_asked_for_and_lie_in_each_other() -> None:
    draw = random.Random(0)
    values = [draw.choice([draw.random(), 0.5]) for _ in range(101)]  # many are equal
    before: set[int] = set()
    for width in (0.05, 0.1, 0.25, 0.4, 0.5):
        kept = select(values, "band", band=(0.5 - width, 0.5 + width))
        assert kept == sorted(kept)
        assert abs(len(kept) - 2 * width * len(values)) <= 1
        assert before <= set(kept)
        before = set(kept)
    lowest, highest = select(values, "lowest", share=0.3), select(values, "highest", share=0.3)
    assert max(values[k] for k in lowest) <= min(values[k] for k in range(101) if k not in lowest)
    assert not set(lowest) & set(highest)
    assert abs(len(highest) - 30.3) <= 1


@pytest.mark.parametrize("band", [(0.75, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.5)])
def test_a_band_of_no_width_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(SettingsError, match=r"instruct\.band must be two quantiles"):
        select([1.0, 2.0], "band", band=band)


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="keeps none of 3 examples, 2 of which"):
        select([1.0, math.nan, 2.0], "lowest", share=0.1)
