"""The mixture: shares, epochs, and a row that depends on its number alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from pegbox.core.errors import DataError
from pegbox.pretrain.mixture import Mixture, RowDataset
from pegbox.pretrain.settings import TokenizerSettings, recipe
from pegbox.pretrain.shards import build
from pegbox.pretrain.tokenizer import train

from .texts import TinyCorpus, prose

COUNTS = {"prose": 3000, "code": 90, "talk": 1, "rare": 50}
WEIGHTS = {"prose": 0.8, "code": 2 / 15, "talk": 1 / 15, "rare": 1e-4}
ORDERS = pytest.mark.parametrize("order", ["shuffled", "blocks"])


def mixture(total: int = 10_007, **changes) -> Mixture:
    return Mixture(**{"counts": COUNTS, "weights": WEIGHTS, "total": total, "seed": 3, **changes})


@ORDERS
@pytest.mark.parametrize("total", [1, 7, 1024, 10_007])
def test_each_source_has_its_share_within_one_row(order, total: int) -> None:
    mixed = mixture(total, order=order)
    for turn in range(3):  # beyond `total` too
        found = Counter(mixed[i][0] for i in range(turn * total, (turn + 1) * total))
        for name, weight in WEIGHTS.items():
            assert abs(found[name] - total * weight / sum(WEIGHTS.values())) < 1
        assert {name: found[name] for name in COUNTS} == mixed.drawn


def test_shuffled_the_shares_hold_all_along() -> None:
    mixed, found = mixture(), Counter[str]()
    for i in range(mixed.total):
        found[mixed[i][0]] += 1
        if i % 1000 == 999:
            assert all(abs(found[name] - i * weight) < 40 for name, weight in WEIGHTS.items())


@ORDERS
def test_no_row_comes_again_before_all_others_of_its_source(order) -> None:
    mixed, seen = mixture(order=order), {name: [] for name in COUNTS}
    for i in range(2 * mixed.total):
        name, row = mixed[i]
        seen[name].append(row)
    for name, count in COUNTS.items():
        epochs = [seen[name][at : at + count] for at in range(0, len(seen[name]), count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert count == 1 or all(a != b for a, b in pairwise(epochs)), "each epoch in an order of its own"


@ORDERS
def test_a_row_depends_on_its_number_alone(order) -> None:
    onwards = [mixture(order=order)[i] for i in range(0, 20_000, 37)]
    mixed = mixture(order=order)
    assert [mixed[i] for i in reversed(range(0, 20_000, 37))] == onwards[::-1]
    other = mixture(order=order, seed=4)
    assert [other[i] for i in range(0, 20_000, 37)] != onwards


def test_in_blocks_source_follows_source() -> None:
    mixed = mixture(order="blocks")
    names = [mixed[i][0] for i in range(mixed.total)]
    assert [a for a, b in pairwise([*names, None]) if a != b] == list(COUNTS)


def test_the_order_stays_what_it_is() -> None:
    """Runs that are under way go on from these."""
    assert [mixture()[i] for i in (0, 1, 2, 5000, 20_000)] == [
        ("prose", 151),
        ("prose", 17),
        ("prose", 1447),
        ("prose", 1595),
        ("prose", 1708),
    ]


def test_a_source_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="'talk'"):
        mixture(counts={**COUNTS, "talk": 0})
    with pytest.raises(IndexError):
        mixture()[-1]


def test_the_data_set_gives_the_rows_of_the_shards(tmp_path) -> None:
    corpus = TinyCorpus(tmp_path, {"prose": prose(20), "code": prose(9, seed=1)})
    values = {"output": str(tmp_path), "sources.prose.path": "p", "sources.code.path": "c", "rows.length": 16}
    made = build(recipe(values), corpus, train(prose(9), TokenizerSettings(size=270)), print)
    data = RowDataset(made, Mixture(made.counts, {"prose": 3, "code": 1}, 50))
    assert len(data) == 50
    for i in (0, 49, 60):
        name, row = data.mixture[i]
        assert data[i]["input_ids"].tolist() == data[i]["labels"].tolist() == made.rows(name)[row].tolist()
