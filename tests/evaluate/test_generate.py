from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pegbox
from pegbox import methods
from pegbox.core import Tuned
from pegbox.core.errors import DataError, ModelError, SettingsError
from pegbox.core.settings import build
from pegbox.evaluate.generate import Decoding, GenerateSettings, generate, generate_file, named_folders, run, stream
from pegbox.evaluate.prompts import ids_of, padded, prompt_of

from . import tiny

PROMPTS = ["Hello there", "x", "A longer prompt, of several words"]
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def two(bases: Path, tmp_path: Path) -> Tuned:
    """Two adapters of two methods on one saved base, saved as a/ and b/."""
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    made = tiny.tuned(model, rank=4, by=0.05, name="a")
    made.save(tmp_path / "a", "a")
    made.add("b", methods.make("miss", {"rank": 4}))
    tiny.moved(made, by=0.05, seed=7)
    made.save(tmp_path / "b", "b")
    return made.eval()


def alone(model: torch.nn.Module, prompt: Any, **more: Any) -> str:
    return generate(model, [prompt], **(SHORT | more))[0]


# -- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "series", "prompt_tuning"])
def test_a_batch_answers_as_each_prompt_alone(method: str) -> None:
    settings = {"lora": {"rank": 4}, "series": {"bottleneck": 4}, "prompt_tuning": {"tokens": 3}}[method]
    model = tiny.tuned(tiny.llama(), method, by=0.05 if method == "lora" else 0.5, **settings)
    tokenizer = tiny.tokenizer()
    together = generate(model, PROMPTS, tokenizer=tokenizer, **SHORT)
    assert together == [alone(model, p, tokenizer=tokenizer) for p in PROMPTS]
    assert together == generate(model, PROMPTS, tokenizer=tokenizer, batch_size=2, **SHORT)
    with model.disabled():
        assert together != generate(model, PROMPTS, tokenizer=tokenizer, **SHORT)


def test_an_encoder_decoder_answers_whole() -> None:
    model, tokenizer = tiny.tuned(tiny.t5(), rank=4, by=0.1), tiny.tokenizer(chat=False)
    together = generate(model, PROMPTS, tokenizer=tokenizer, **SHORT)
    assert together == [alone(model, p, tokenizer=tokenizer) for p in PROMPTS]


def test_each_row_may_use_its_own_adapter(two: Tuned, bases: Path, tmp_path: Path) -> None:
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    mixed = generate(bases / "llama", PROMPTS, adapters=folders, which=["a", "b", None], **SHORT)
    assert mixed[0] == alone(two.use("a"), PROMPTS[0])
    assert mixed[1] == alone(two.use("b"), PROMPTS[1])
    with two.disabled():
        assert mixed[2] == alone(two, PROMPTS[2])
    assert mixed[0] == alone(tmp_path / "a", PROMPTS[0])


def test_adapters_need_a_choice(two: Tuned, bases: Path, tmp_path: Path) -> None:
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    with pytest.raises(SettingsError, match="there are 2 adapters, so each prompt must name one of a, b"):
        generate(bases / "llama", PROMPTS, adapters=folders)
    with pytest.raises(SettingsError, match="no adapter 'c'; one of: a, b"):
        generate(two, PROMPTS, which=["a", "b", "c"])
    with pytest.raises(SettingsError, match="3 prompts and 1 names"):
        generate(two, PROMPTS, which=["a"])
    with pytest.raises(SettingsError, match="the model has none"):
        generate(bases / "llama", PROMPTS, which=[None] * 3)


def test_draws_come_from_the_seed_and_leave_the_global_generator_alone(bases: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (alone(bases / "llama", "Hm", temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_that_cannot_generate_or_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"a BertForSequenceClassification generates no text; pegbox\.evaluate\.classify"
    ):
        generate(tiny.bert(), ["x"], tokenizer=tiny.tokenizer())
    with pytest.raises(ModelError, match="LlamaForCausalLM has no tokenizer beside it"):
        generate(tiny.llama(), ["x"])
    with pytest.raises(ModelError, match=r"the model '.*nothing' cannot be loaded"):
        generate(tmp_path / "nothing", ["x"])
    with pytest.raises(DataError, match=r"prompt 2 has 322 tokens; with max_new_tokens=8 that is more than the 256"):
        generate(tiny.llama(), ["x", "y" * 300], tokenizer=tiny.tokenizer(), batch_size=1, **SHORT)
    with pytest.raises(SettingsError, match=r"generate has no setting 'max_tokens'; did you mean 'max_new_tokens'"):
        generate(tiny.llama(), ["x"], tokenizer=tiny.tokenizer(), max_tokens=3)


# -- prompts -----------------------------------------------------------------------------------------------------


def test_a_text_is_a_users_turn_where_there_is_a_template() -> None:
    chat, plain = tiny.tokenizer(), tiny.tokenizer(chat=False)
    assert chat.decode(ids_of("Hi", chat)) == "<|user|>Hi</s><|assistant|>"
    assert chat.decode(ids_of("Hi", chat, system="Brief.")) == "<|system|>Brief.</s><|user|>Hi</s><|assistant|>"
    assert chat.decode(ids_of("Hi", chat, raw=True)) == "Hi"
    assert plain.decode(ids_of("Hi", plain)) == "Hi"
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert ids_of(turns, chat, system="other") == ids_of(turns, chat)
    with pytest.raises(DataError, match="has no chat template"):
        ids_of(turns, plain)
    with pytest.raises(DataError, match="a system message needs a chat template"):
        ids_of("Hi", plain, system="Brief.")
    with pytest.raises(DataError, match="the prompt '' has no tokens"):
        ids_of("", plain)


def test_padding_goes_where_it_is_wanted() -> None:
    ids, mask = padded([[1, 2, 3], [4]], 0, left=True)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded([[1, 2, 3], [4]], 9, left=False)[0].tolist() == [[1, 2, 3], [4, 9, 9]]


def test_prompts_are_found_in_rows_of_many_layouts() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert prompt_of({"messages": turns}, "row 1") == turns[:1]
    told = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert prompt_of({"conversations": told}, "row 1") == turns[:1]
    assert prompt_of({"instruction": "Do", "input": "this", "output": "done"}, "row 1") == "Do\nthis"
    assert prompt_of({"prompt": "Q", "text": "no"}, "row 1") == "Q"
    with pytest.raises(DataError, match="row 1 has no prompt; it has answer"):
        prompt_of({"answer": "A"}, "row 1")
    with pytest.raises(DataError, match="row 1 has a message with who, not role and content"):
        prompt_of({"messages": [{"who": "me"}]}, "row 1")


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_is_answered_in_order(two: Tuned, bases: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    rows = [
        {"prompt": p, "adapter": a, "id": k} for k, (p, a) in enumerate(zip(PROMPTS, ["b", None, "a"], strict=True))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert generate_file(bases / "llama", source, out, adapters=folders, batch_size=2, **SHORT) == 3
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["id"] for a in answers] == [0, 1, 2]
    assert [a["response"] for a in answers] == generate(two, PROMPTS, which=["b", None, "a"], **SHORT)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_row_without_a_prompt_stops_before_anything_is_generated(bases: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"answer": "b"}\n')
    with pytest.raises(DataError, match=r"in\.jsonl, row 2 has no prompt"):
        generate_file(bases / "llama", source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_answers_a_prompt_or_a_file(two: Tuned, bases: Path, tmp_path: Path) -> None:
    def told(**values: Any) -> str:
        return run(build(GenerateSettings, SHORT | values))

    folder = str(tmp_path / "a")
    assert told(adapter=folder, prompt="x") == alone(two.use("a"), "x")
    assert told(model=str(bases / "llama"), adapters=f"b={tmp_path / 'b'}", prompt="x") == alone(two.use("b"), "x")
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    out = str(tmp_path / "out.jsonl")
    assert told(adapter=folder, data=str(tmp_path / "in.txt"), output=out) == f"2 answers in {out}"
    for wrong in ({"prompt": "x"}, {"adapter": folder}, {"adapter": folder, "prompt": "x", "data": "y"}):
        with pytest.raises(SettingsError, match="generate needs"):
            told(**wrong)
    with pytest.raises(SettingsError, match="needs output="):
        told(adapter=folder, data="in.txt")
    assert named_folders("a=x, b=y") == named_folders(["a=x", "b=y"]) == {"a": "x", "b": "y"}
    with pytest.raises(SettingsError, match="adapters are given as name=folder, got 'a'"):
        named_folders("a")


# -- streams -----------------------------------------------------------------------------------------------------


def test_a_stream_says_what_generate_says() -> None:
    model, tokenizer = tiny.tuned(tiny.llama(), rank=4, by=0.05), tiny.tokenizer()
    pieces = list(stream(model, tokenizer, "Hello", Decoding(max_new_tokens=8)))
    assert "".join(pieces) == alone(model, "Hello", tokenizer=tokenizer)


def test_leaving_off_a_stream_stops_the_model() -> None:
    calls: list[int] = []
    model = tiny.llama()
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    pieces = stream(model, tiny.tokenizer(), "Hello", Decoding(max_new_tokens=200, temperature=5.0))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert 0 < len(calls) < 200


def test_an_error_while_streaming_reaches_the_caller() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    model = tiny.llama()
    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(stream(model, tiny.tokenizer(), "Hello", Decoding(max_new_tokens=8)))


def test_a_loaded_adapter_generates_like_the_tuned_model(two: Tuned, bases: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    again = pegbox.load(model, tmp_path / "b")
    assert alone(again, PROMPTS[2]) == alone(two.use("b"), PROMPTS[2])
