from __future__ import annotations

import random

import pytest

from pegbox.pretrain.clean import clean, without_addresses, without_markup, without_repeated_paragraphs
from pegbox.pretrain.settings import CleanSettings

NUMBERS = "1850-1905, 1,000,000 in 1905-03-12; 978-3-16-148410-0"
OFF = CleanSettings(markup=False, garbled=1.0, least=0)


def test_markup_goes_and_text_that_looks_like_it_stays() -> None:
    page = (
        "<!DOCTYPE html><html><head><style>p { color: red }</style></head><body class='x' hidden>"
        "<h1>Fish &amp; chips</h1><!-- a <p> -->\n<p>Salt,&nbsp;<b>vinegar</b>.</p><SCRIPT async>if (a<b) {}</SCRIPT >"
        "<ul><li>one<li>two</ul><img src='a.png' alt='a > b'/></body></html>"
    )
    shown = [line for line in without_markup(page).split("\n") if line]
    assert shown == ["Fish & chips", "Salt, vinegar.", "one", "two"]
    for text in ("if a <b and c> d", "vector<int> x; <EOL>", "1 < 2 > 1 <3", "<script> is a tag", "AT&T &amp; co"):
        assert without_markup(text).strip() == text.replace("<script>", "").strip()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("See http://a.org/x?y=1#z, or www.b.com.", "See [link], or [link]."),
        ("见http://a.org/是。写信给a.b@c.co.uk。", "见[link]是。写信给[email]。"),
        ("at 192.168.0.1: v1.2.3 and 300.1.1.1", "at [ip]: v1.2.3 and 300.1.1.1"),
        ("+44 (20) 7946 0958, (212) 555-0123, 电话13912345678", "[phone], [phone], 电话[phone]"),
        (NUMBERS, NUMBERS),
    ],
)
def test_addresses_become_placeholders(text: str, left: str) -> None:
    assert without_addresses(text) == left


def test_lines_that_are_no_sentences_go() -> None:
    page = "Home | About\n\nIt was late and\nwe went home.\n-----\nEnable JavaScript.\n“Yes!”\n\nBuy now\n对。"
    settings = CleanSettings(lines=True, least=0)
    assert clean(page, settings).text == "It was late and\nwe went home.\n“Yes!”\n\n对。"


def test_reasons() -> None:
    def reason(text: str, **settings: object) -> str | None:
        return clean(text, CleanSettings(**{"least": 0, **settings})).reason  # type: ignore[arg-type]

    assert reason("ab\ufffd" * 9) == "garbled"
    assert reason("A Bad apple.", words=("bad",)) == "words"
    assert reason("A badge.", words=("bad", "")) is None
    assert reason("这是坏东西", words=("坏",)) == "words"
    assert reason("short", least=6) == "short"
    assert reason("<b " * 200 + ">" * 200) == "nested markup"
    assert reason(" \n") == "empty"


def test_what_is_kept_can_be_written_and_keeps_its_form() -> None:
    code = "\n    def f(x):\r\n\t  return x\x00 + '\ud800'\n\n\n# end  \n"
    kept = clean(code, CleanSettings(garbled=1.0, least=0)).text
    assert kept == "    def f(x):\n\t  return x + ''\n\n\n# end"
    kept.encode("utf-8")
    assert clean("one two three", CleanSettings(most=9, least=0)).text == "one two"
    assert clean("cafe\u0301s", CleanSettings(most=4, least=0)).text == "caf", "an accent stays with its letter"


def test_cleaning_what_is_clean_changes_nothing() -> None:
    bits = ["<p>", "</b", ">", "<scr", "ipt>", "</script>", "&lt;", "&amp;", "&#32;", "\n", "\n\n", " ", "word.", "Bad"]
    bits += [
        "<a",
        "href=x",
        "\x00",
        "\ufffd",
        "555-123-4567",
        "-",
        "1.2.3.4",
        "a@b.co",
        "http://x.y",
        "é",
        "e\u0301",
        "坏",
    ]
    bits += ["<!--", "-->", "No end", "and", "\ud800", "\ufeff", "\r"]
    for seed in range(300):
        draw = random.Random(seed)
        text = "".join(draw.choices(bits, k=30))
        settings = CleanSettings(
            garbled=1.0, addresses=draw.random() < 0.7, lines=draw.random() < 0.5, least=0, most=draw.choice([None, 40])
        )
        once = clean(text, settings)
        if once.text is not None:
            assert clean(once.text, settings) == once, (seed, text)


def test_repeated_paragraphs() -> None:
    text = "One.\n\none. \n \nTwo.\n\n\nTwo.\n\nOne."
    assert without_repeated_paragraphs(text) == "One.\n \nTwo.\n\nOne."
    assert clean("A <b> and\n\nmore", OFF).text == "A <b> and\n\nmore"
