"""The tokenizer: any text comes back, special tokens have fixed ids, the same texts give the same one."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pegbox.core.errors import DataError, SettingsError
from pegbox.data.templates import prove
from pegbox.pretrain.settings import TokenizerSettings, recipe
from pegbox.pretrain.tokenizer import SPECIAL, encode, prepare, train

from .texts import TinyCorpus, prose


@pytest.fixture(scope="module")
def made():
    return train(prose(60), TokenizerSettings(size=300))


def any_text(draw: random.Random) -> str:
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randrange(200)))


def test_any_text_comes_back(made) -> None:
    draw = random.Random(0)
    written = [
        "  two  spaces\n\n\ttabs ",
        "don’t 1905 ²½",
        "e\u0301 \u0939\u093f\u0928\u094d\u0926\u0940",
        "a</s><s> <|end|>b",
        "",
    ]
    texts = [*written, *(any_text(draw) for _ in range(300))]
    ids = list(encode(made, texts))
    assert [made.decode(row) for row in ids] == texts
    assert [made.decode(made.encode(text, add_special_tokens=False)) for text in texts] == texts
    assert min(min(row) for row in ids if row) >= len(SPECIAL), "no special token, even where one is spelled out"


def test_special_tokens_have_the_lowest_ids_and_a_text_begins_with_one(made) -> None:
    assert made.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, made.unk_token_id) == (0, 1, 2, None)
    assert made("word")["input_ids"][0] == 0
    assert len(made) == 300


def test_the_answers_of_its_template_are_what_is_trained(made) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
    shown = "<s><|system|>Be brief.<|end|><|user|>Who?<|end|><|assistant|>Me.<|end|>"
    assert made.apply_chat_template(chat, tokenize=False) == shown
    out = made.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert made.decode(trained) == "Me.<|end|>"
    prove(made)  # the suite's own probes of templates


def test_the_same_texts_give_the_same_tokenizer_and_digits_stay_apart(made) -> None:
    again = train(prose(60), TokenizerSettings(size=300))
    assert again.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    numbers = train(["1905 1905 1905"] * 9, TokenizerSettings(size=300))
    assert numbers.tokenize("1905") == list("1905")


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least 263"):
        train(["text"], TokenizerSettings(size=262))


def test_it_is_made_once_and_anew_when_what_it_is_made_of_changes(tmp_path: Path) -> None:
    corpus = TinyCorpus(tmp_path, {"prose": prose(40), "code": ["x = 1\n" * 20] * 3})
    values = {"output": str(tmp_path), "sources.prose.path": "p", "sources.code.path": "c", "tokenizer.size": 300}
    said: list[str] = []
    first = prepare(recipe(values), corpus, said.append)
    second = prepare(recipe(values), corpus, said.append)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert said[1].endswith("as made before")
    assert "prose" in said[0]
    assert "code" in said[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").encode("word") == first.encode("word")

    assert len(prepare(recipe({**values, "tokenizer.size": 310}), corpus, said.append)) == 310
    table = tmp_path / "tokenizer" / "tokenizer.json"
    table.write_text(table.read_text()[:-9])
    with pytest.raises(DataError, match="delete"):
        prepare(recipe({**values, "tokenizer.size": 310}), corpus, said.append)


def test_weights_decide_how_often_a_source_is_counted(tmp_path: Path) -> None:
    corpus = TinyCorpus(tmp_path, {"plain": ["cat dog"] * 40, "odd": ["xyzzy plugh"] * 4})
    values = {"output": str(tmp_path), "sources.plain.path": "p", "tokenizer.size": 268, "tokenizer.least": 1}
    light = prepare(recipe({**values, "sources.odd": {"path": "o", "weight": 0.01}}), corpus, print)
    heavy = prepare(recipe({**values, "sources.odd": {"path": "o", "weight": 9.0}}), corpus, print)
    assert len(light.tokenize("cat dog")) < len(heavy.tokenize("cat dog"))
    assert len(heavy.tokenize("xyzzy plugh")) < len(light.tokenize("xyzzy plugh"))


def test_one_from_elsewhere_is_taken_as_it_is(tmp_path: Path, made) -> None:
    corpus = TinyCorpus(tmp_path, {"prose": prose(4)})
    made.save_pretrained(tmp_path / "given")
    values = {"output": str(tmp_path), "sources.prose.path": "p", "tokenizer.path": str(tmp_path / "given")}
    assert prepare(recipe(values), corpus, print).backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    with pytest.raises(SettingsError, match=r"tokenizer\.path"):
        prepare(recipe({**values, "tokenizer.path": str(tmp_path / "nothing")}), corpus, print)


def test_a_full_disk_leaves_the_earlier_one_intact(tmp_path: Path, made, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TinyCorpus(tmp_path, {"prose": prose(9)})
    values = {"output": str(tmp_path), "sources.prose.path": "p", "tokenizer.size": 270}
    before = prepare(recipe(values), corpus, print)

    def full(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(made), "save_pretrained", lambda self, folder: full(folder))
        with pytest.raises(DataError, match=r"No space left.*intact"):
            prepare(recipe({**values, "tokenizer.size": 280}), corpus, print)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tokenizer"]
    said: list[str] = []
    assert len(prepare(recipe(values), corpus, said.append)) == len(before)
    assert said[0].endswith("as made before")
