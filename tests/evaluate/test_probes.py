from __future__ import annotations

import pytest
import torch

from pegbox.core.errors import DataError, ModelError
from pegbox.evaluate.probes import LENGTH, TEXTS, Probe, builtin, from_row, probes

from . import tiny


def test_builtin_texts_in_many_scripts_run_on_every_kind_of_model() -> None:
    for model in (tiny.llama(), tiny.gpt2(), tiny.bert(), tiny.tagger(), tiny.t5()):
        made = builtin(model, tiny.tokenizer())
        assert [p.name for p in made] == [f"text: {name}" for name in TEXTS]
        for probe in made[:3]:
            assert torch.isfinite(model(**probe.inputs).logits).all()
            assert probe.inputs["input_ids"].shape[1] <= LENGTH


def test_ids_are_drawn_from_a_seed_where_there_is_no_tokenizer() -> None:
    one, same, other = (builtin(tiny.llama(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[-1].inputs["input_ids"], other[-1].inputs["input_ids"])
    assert {p.inputs["input_ids"].shape[1] for p in one} == {1, 7, 24, 48}


def test_image_models_get_pixels_of_their_size() -> None:
    model = tiny.vit()
    (first, *_) = made = builtin(model)
    assert first.inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert len({float(p.inputs["pixel_values"].sum()) for p in made}) == len(made)
    assert model(**first.inputs).logits.shape == (1, 4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("plain", "plain"),
        ({"text": "a text"}, "a text"),
        ({"tokens": ["two", "words"], "tags": ["O", "O"]}, "twowords"),
        ({"messages": [{"role": "user", "content": "Hm"}, {"role": "assistant", "content": "Ah"}]}, "<|user|>Hm"),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "A"}]},
            "<|user|>Q",
        ),
        ({"input_ids": [72, 105]}, "ik"),
    ],
)
def test_rows_of_every_kind_come_first(row: dict[str, object] | str, said: str) -> None:
    tokenizer = tiny.tokenizer()
    made = probes(tiny.llama(), tokenizer, [row])
    assert len(made) == 1 + len(TEXTS)
    ids = made[0].inputs["input_ids"][0]
    assert ids.tolist() == row["input_ids"] if "input_ids" in row else tokenizer.decode(ids).startswith(said)


def test_a_pair_of_texts_is_read_as_one() -> None:
    probe = from_row({"text": "one", "text_pair": "two", "label": 1}, "row 1", tiny.tokenizer())
    assert probe.inputs["input_ids"].shape == (1, 6)


def test_long_rows_are_cut_to_what_the_model_holds() -> None:
    model = tiny.llama(max_position_embeddings=20)
    assert probes(model, tiny.tokenizer(), ["x" * 500])[0].inputs["input_ids"].shape == (1, 18)


def test_what_cannot_be_probed_is_an_error() -> None:
    with pytest.raises(DataError, match="row 1 is text, and there is no tokenizer"):
        probes(tiny.llama(), None, ["a text"])
    with pytest.raises(DataError, match=r"row 1 has none of text, tokens, messages.*it has: label"):
        probes(tiny.llama(), tiny.tokenizer(), [{"label": 1}])
    with pytest.raises(ModelError, match="token id 300, and the model's embedding has 264 rows"):
        probes(tiny.llama(), None, [{"input_ids": [1, 300]}])
    with pytest.raises(ModelError, match=r"what a Linear reads is not known; pass probes="):
        builtin(torch.nn.Linear(2, 2))


def test_a_decoder_gets_a_start() -> None:
    (probe, *_) = builtin(tiny.t5(), tiny.tokenizer())
    assert isinstance(probe, Probe)
    assert probe.inputs["decoder_input_ids"][0, 0] == 258
