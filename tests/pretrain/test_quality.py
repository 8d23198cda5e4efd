from __future__ import annotations

import random
import sys

import pytest

from pegbox.core.errors import MissingExtra, SettingsError
from pegbox.pretrain.quality import COMMON, check_language, judge, language
from pegbox.pretrain.settings import CleanSettings

PROSE = """It was a bright cold day in spring, and the clocks of the town were striking when the old man came up.
He had walked since morning; nobody had asked him where he was going, and he would not have said.

"You are late," said the woman at the gate. "We have waited with supper since six."

He took off his hat, looked at the house as if for the first time, and went in without a word."""
DRAW = random.Random(0)
SPEECHES = [" ".join("".join(DRAW.choices("abcdefgh", k=5)) for _ in range(12)) for _ in range(80)]
PLAY = "\n\n".join(f"**{('HAMLET', 'GHOST')[i % 2]}**\n{speech}." for i, speech in enumerate(SPEECHES))
CHINESE = "春天来了，河边的柳树发出了新芽。孩子们在院子里放风筝，老人坐在门口晒太阳，谁也不想回家。"
GERMAN = "Ja, das ist ein ganz gewöhnlicher Satz ohne jede Auffälligkeit."
CODE = "def f(x):\n    return {'a': [x[0] + 1, {'b': -x[1]}], 'c': {}}\n" * 5


def reason(text: str, **settings: object) -> str | None:
    return judge(text, CleanSettings(**settings))  # type: ignore[arg-type]


LIFE = "Manfred Aschner (Hebrew: מנפרד אשנר; 21 May 1901 - 1989) was an Israeli microbiologist and entomologist."
TOKENS = "The song , released in 1994 , was a hit ; critics @-@ and the public - loved it . " + PROSE
HINDI = "मेरा नाम राम है और मैं दिल्ली में रहता हूँ, जहाँ मेरे बहुत से मित्र हैं।"


@pytest.mark.parametrize("text", [PROSE, PLAY, CHINESE, GERMAN, LIFE, TOKENS, HINDI])
def test_running_text_stays(text: str) -> None:
    assert reason(text) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Lorem ipsum dolor sit amet", "placeholder text"),
        (CODE, "braces"),
        ("a b c d e f g h", "word length"),
        ("# of the #tag #tags for all #these #words", "symbols"),
        ("\n".join(f"- another entry, number {i}" for i in range(9)), "bullets"),
        ("\n".join(f"The story number {i} goes on and on from here..." for i in range(9)), "ellipses"),
        ("1024 2048 4096 8192 16384 or 32768 65536", "few letters"),
        ("buy cheap watches " * 40, "repetition"),
    ],
)
def test_other_text_goes_for_its_reason(text: str, why: str) -> None:
    assert reason(text) == why
    assert reason(text, quality=False, repeats=1.0) is None


def test_repeated_lines() -> None:
    lines = [f"This line is the line of number {i % 5}, as said." for i in range(10)]
    assert reason("\n".join(lines), quality=False) == "repeated lines"
    assert reason("\n".join(lines), quality=False, repeats=0.5) is None


def test_shuffled_repetition_is_counted_in_runs() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(400)]
    again = words[:100]
    assert reason(" ".join(words)) is None
    assert reason(" ".join(words + again)) == "repetition"


def test_languages() -> None:
    assert (language(PROSE), language(CHINESE)) == ("en", "zh")
    assert reason(CHINESE, language="en") == "language zh"
    assert reason(PROSE, language="en") is None
    bare = [word for word in PROSE.split() if word.lower().strip('.,"') not in COMMON]
    assert reason(" ".join(bare + bare[::-1]), language="en") == "no common words"
    assert reason(" ".join(bare), language="en") is None, "fewer words need not have them"
    with pytest.raises(SettingsError, match=r"unknown code 'eng'; did you mean 'en'"):
        check_language("eng")


def test_a_language_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(MissingExtra, match=r"pegbox\[pretrain\]"):
        language(PROSE)
