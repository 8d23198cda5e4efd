from __future__ import annotations

import pytest

from pegbox.core.errors import DataError
from pegbox.evaluate.chat import Chat
from pegbox.evaluate.generate import Decoding, generate

from . import tiny

SHORT = Decoding(max_new_tokens=8)


def test_the_history_is_what_the_next_answer_sees() -> None:
    model, tokenizer = tiny.tuned(tiny.llama(), rank=4, by=0.05), tiny.tokenizer()
    chat = Chat(model, tokenizer, SHORT)
    first = "".join(chat.say("One"))
    assert chat.history == [{"role": "user", "content": "One"}, {"role": "assistant", "content": first}]
    asked = [*chat.history, {"role": "user", "content": "Two"}]
    second = "".join(chat.say("Two"))
    assert [second] == generate(model, [asked], tokenizer=tokenizer, decoding=SHORT)
    chat.undo()
    assert len(chat.history) == 2
    assert "".join(chat.say("Two")) == second
    chat.reset()
    assert "".join(chat.say("One")) == first


def test_a_system_message_opens_every_prompt_and_is_not_in_the_history() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    decoding = Decoding(max_new_tokens=8, system="Be brief.")
    chat = Chat(model, tokenizer, decoding)
    said = "".join(chat.say("One"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}]
    assert [said] == generate(model, [messages], tokenizer=tokenizer, decoding=SHORT)
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"]


def test_leaving_off_keeps_what_was_said() -> None:
    chat = Chat(tiny.llama(), tiny.tokenizer(), Decoding(max_new_tokens=64, temperature=3.0))
    answer = chat.say("One")
    piece = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert chat.history[-1]["role"] == "assistant"
    assert chat.history[-1]["content"].startswith(piece)


def test_an_error_keeps_nothing() -> None:
    chat = Chat(tiny.llama(), tiny.tokenizer(), SHORT)
    with pytest.raises(DataError, match="more than the 256 the model holds"):
        list(chat.say("x" * 300))
    assert chat.history == []


def test_a_template_may_be_given_by_name() -> None:
    tokenizer = tiny.tokenizer(chat=False)
    with pytest.raises(DataError, match="has no chat template"):
        Chat(tiny.llama(), tokenizer)
    chat = Chat(tiny.llama(), tokenizer, Decoding(max_new_tokens=4, template="chatml"))
    assert "".join(chat.say("Hi")) == chat.history[-1]["content"]
