from __future__ import annotations

import io

import pytest
from chat_families import FAMILIES
from rich.console import Console
from rich.text import Text
from small_tokenizers import KINDS, small

from pegbox.data.check import check
from pegbox.data.examples import read
from pegbox.data.preview import CONTEXT, SPECIAL, TRAINED, mask, render
from pegbox.data.tokenise import Encoded, encode

TALK = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "I am fine, thank you. 😀"}]


def stretches(text: Text) -> list[tuple[str, str]]:
    return [(str(span.style), text.plain[span.start : span.end]) for span in text.spans]


def test_trained_context_and_special_tokens_are_told_apart() -> None:
    tokenizer = small("byte-level", FAMILIES["qwen"])
    row = encode({"id": "a", "messages": TALK}, tokenizer, max_length=200)
    assert isinstance(row, Encoded)
    found = mask(row, tokenizer)
    assert (TRAINED, "I am fine, thank you. 😀") in stretches(found)
    assert (f"{TRAINED} {SPECIAL}", "<|im_end|>") in stretches(found)
    assert (f"{CONTEXT} {SPECIAL}", "<|im_start|>") in stretches(found)
    assert any(style == CONTEXT and "Hello there!" in text for style, text in stretches(found))


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_lost_between_stretches(kind: str) -> None:
    tokenizer = small(kind)
    ids = tokenizer("Hello there! I am fine, thank you.", add_special_tokens=False)["input_ids"]
    labels = [token if i % 3 else -100 for i, token in enumerate(ids)]
    assert mask(Encoded(ids, labels, "a"), tokenizer).plain == tokenizer.decode(ids)


def test_a_report_is_written_out() -> None:
    rows = [{"text": f"Text [bold]{i}[/bold].", "label": i % 2} for i in range(10)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(check(read(rows))))
    written = console.export_text()
    assert "rows: text classification" in written
    assert "no fault found" in written
    console.print(render(check(read([*rows, rows[0]]))))
    written = console.export_text()
    assert "warning duplicate (1): rows repeat an earlier one" in written
    assert "drop the repeats" in written
    assert "0 6, 1 5" in written
