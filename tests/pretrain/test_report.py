from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from pegbox.pretrain import cards, report
from pegbox.pretrain.curves import bits, points
from pegbox.pretrain.instruct import Part
from pegbox.pretrain.report import Sample, Story, samples, table
from pegbox.pretrain.settings import recipe
from pegbox.pretrain.shards import Packed

from . import small_base

LOG: list[dict[str, Any]] = [
    {"step": 1, "loss": 5.5, "learning_rate": 1e-3, "tokens_per_second": 900.0},
    {"step": 2, "loss": float("nan"), "learning_rate": 1e-3, "tokens_per_second": 1100.0},
    {"step": 2, "eval_bits_apart": 3.5},
    {"step": 3, "loss": 4.5, "learning_rate": 1e-4, "tokens_per_second": 1000.0},
    {"step": 3, "train_runtime": 9.0},
]


def story(**changes: Any) -> Story:
    given = recipe(
        {
            "name": "tiny",
            "sources": {
                "books": {"path": "b.txt", "weight": 3, "licence": "public domain", "cite": "Somebody, 1900"},
                "code": {"path": "c.txt", "clean": {"quality": False}},
            },
            "held_out": {"apart": "a.txt"},
        }
    )
    counts: dict[str, Any] = {"read": 10, "kept": 8, "bytes_read": 1200, "bytes_kept": 1000}
    plain = Story(
        recipe=given,
        command="pegbox pretrain tiny.yaml",
        made_by={"pegbox": "0.1", "commit": None, "packages": {"torch": "2.13"}, "machine": {"cores": 2}},
        parameters=123_456,
        texts={
            "books": {**counts, "dropped": {"exact duplicate": 2}},
            "code": {**counts, "dropped": {"held out": 1, "too short": 1}},
        },
        held_out={"apart": {"bytes_kept": 777}},
        packed={name: Packed(5, 8, 400, 1, 3, ()) for name in ("books", "code")},
        bytes_per_token={"books": 3.21, "code": 2.5},
        log=LOG,
        spikes=[{"step": 2, "loss": None, "why": "loss nan | norm", "did": "rejected"}],
        bits={"apart": 2.345},
        compressed={"apart": {"xz": 2.5, "ppmd": None}},
        tokens=98_765,
    )
    return dataclasses.replace(plain, **changes)


def written(told: Story, folder: Path) -> str:
    return report.write(told, folder).read_text()


def test_it_tells_what_was_measured(tmp_path: Path) -> None:
    text = written(story(), tmp_path)
    assert "123,456 parameters, trained from nothing on 98,765 tokens, 1,000 of them a second" in text
    assert "The loss ended at 4.500" in text
    assert "| apart | 2.345 | 2.500 | - | 777 |" in text
    assert "PPMd needs pyppmd" in text
    assert "| books | 10 | 8 | 1,000 | 400 | 3.210 | 75.0 % | public domain |" in text
    assert "| code | 10 | 8 | 1,000 | 400 | 2.500 | 25.0 % | not given |" in text
    assert "| 2 | - | loss nan \\| norm | rejected |" in text
    assert "pegbox pretrain tiny.yaml" in text
    assert "| torch | 2.13 |" in text
    assert "all of them" not in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_several_held_out_texts_are_also_one() -> None:
    sizes = {"a": {"bytes_kept": 3000}, "b": {"bytes_kept": 1000}}
    found: Any = {"a": {"xz": 2.0, "ppmd": None}, "b": {"xz": 4.0, "ppmd": 2.0}}
    text = report.bits_section(story(held_out=sizes, bits={"a": 1.0, "b": 2.0}, compressed=found))
    assert "| all of them | 1.250 | 2.500 | - | 4,000 |" in text


def test_instructions_and_continuations_where_there_are_some(tmp_path: Path) -> None:
    assert "## Instructions" not in written(story(), tmp_path)
    parts = {"chats": Part(10, 1, 2, 0, 4, 3, 1.25)}
    told = story(parts=parts, samples=[Sample("Once", " upon a\n\ntime", "~~~")])
    text = written(told, tmp_path)
    assert "| chats | 10 | 1 | 2 | 0 | 4 | 3 | 1.250 |" in text
    assert "~~~~text\n upon a\n\ntime\n~~~~" in text


def test_the_cards_say_whose_the_texts_are_and_what_was_dropped() -> None:
    data = cards.data_card(story())
    assert "| books | public domain | Somebody, 1900 |" in data
    assert "| source | exact duplicate | held out | too short |" in data
    assert "| code | 0 | 1 | 1 |" in data
    assert "share 13 words in a row" in data
    assert "`sources.code.clean.quality`" in data
    card = cards.model_card(story())
    assert card.startswith("---\nlibrary_name: transformers\n")
    licensed = dataclasses.replace(story().recipe, licence="mit")
    assert cards.model_card(story(recipe=licensed)).startswith("---\nlicense: mit\n")
    assert "| `model.hidden` | `256` |" in card


def test_the_use_of_a_card_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_base.model().save_pretrained(tmp_path)
    small_base.tokenizer().save_pretrained(tmp_path)
    code = re.findall(r"```python\n(.*?)```", cards.model_card(story()), re.DOTALL)[0]
    exec(code.replace("FOLDER", str(tmp_path)), {})  # the card is our own
    assert capsys.readouterr().out.startswith("It was")


def test_greedy_continuations_are_the_likeliest_and_draws_repeat() -> None:
    model, reader = small_base.model(), small_base.tokenizer()
    first, again = (samples(model, reader, ["The sea", "A"], 128, seed=3) for _ in range(2))
    assert first == again
    other = samples(model, reader, ["The sea", "A"], 128, seed=4)
    assert [s.greedy for s in other] == [s.greedy for s in first]
    assert [s.drawn for s in other] != [s.drawn for s in first]
    assert samples(model, reader, [], 128, seed=3) == []


def test_curves_take_what_a_line_of_the_log_has() -> None:
    assert [step for step, _ in points(LOG, "loss")] == [1, 2, 3]
    assert bits(LOG) == {"apart": [(2, 3.5)]}


def test_a_table_keeps_its_form_whatever_is_in_it() -> None:
    assert table(("a", "b"), [("x|y\nz", 1), ("w", None)]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y z | 1 |",
        "| w | - |",
    ]
