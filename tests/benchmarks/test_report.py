"""From rounds to ratios, verdicts and the page; nothing is measured here."""

from __future__ import annotations

import pytest
from benchmarks.pairs import Pair, over_all
from benchmarks.ratios import Bar, Reading, Round, curve_gap, ratio, value
from benchmarks.report import render

SPEED = Bar("speed", ratio("theirs.step", "ours.step"), at_least=1.5)


def rounds(*steps: tuple[float, float]) -> list[Round]:
    return [{"ours": {"step": ours}, "theirs": {"step": theirs}} for ours, theirs in steps]


def result(*steps: tuple[float, float]) -> dict[str, object]:
    return {"rounds": rounds(*steps), "date": "2026-01-01", "load_before": 0.1, "machine": {"processor": "a CPU"}}


def pair(name: str) -> Pair:
    return Pair(name, f"The pair {name}", "training", {}, {}, (SPEED,))


def test_a_ratio_is_formed_within_each_round() -> None:
    reading = Reading.of(SPEED, rounds((1.0, 2.0), (4.0, 8.0), (2.0, 3.0)))
    assert (reading.median, reading.low, reading.high) == (2.0, 1.5, 2.0)
    assert str(reading) == "2 (1.5 to 2)"


@pytest.mark.parametrize(
    ("limits", "met"),
    [({"at_least": 2.0}, True), ({"at_least": 2.1}, False), ({"at_most": 2.0}, True), ({"at_most": 1.9}, False)],
)
def test_the_median_decides(limits: dict[str, float], met: bool) -> None:
    bar = Bar("speed", ratio("theirs.step", "ours.step"), **limits)
    assert Reading.of(bar, rounds((1.0, 2.0), (1.0, 1.0), (1.0, 3.0))).met is met


def test_what_could_not_be_measured_misses_its_bar() -> None:
    bar = Bar("help", value("ours.help"), at_most=0.3)
    reading = Reading.of(bar, [{"ours": {"help": None}}])
    assert not reading.met
    assert str(reading) == "not measured"
    assert Reading.of(Bar("help", value("ours.help")), [{"ours": {"help": None}}]).met, "only reported"


def test_a_gap_between_curves_is_counted_in_gaps_between_seeds() -> None:
    runs = [
        {"ours": {"losses": [2.0, 2.0]}, "theirs": {"losses": [2.0, 1.8]}},
        {"ours": {"losses": [2.0, 2.0]}, "theirs": {"losses": [2.0, 1.6]}},
    ]
    assert curve_gap("losses")(runs) == pytest.approx([1.0, 2.0])
    assert curve_gap("losses")(runs[:1]) == [], "one round has no noise to compare with"


def test_the_page_names_met_missed_and_absent() -> None:
    known = {name: pair(name) for name in ("good", "bad", "absent")}
    page = render(known, {"good": result((1.0, 2.0)), "bad": result((1.0, 1.25), (1.0, 1.0))})
    assert "| speed | 2 | ≥ 1.5 | met |" in page
    assert "| speed | 1.12 (1 to 1.25) | ≥ 1.5 | **missed** |" in page
    assert "- The pair bad: speed should be ≥ 1.5, measured 1.12 (1 to 1.25)." in page
    assert "- The pair absent: speed should be ≥ 1.5, measured not measured." in page
    assert page.count("- processor: a CPU") == 1, "pairs of one machine share its lines"


def test_a_page_without_misses_says_so() -> None:
    assert "No bar was missed." in render({"good": pair("good")}, {"good": result((1.0, 2.0))})


def test_the_mean_over_peft_is_geometric_and_of_medians() -> None:
    """Pairs that compare with something else do not count, and one that is unmeasured leaves no mean."""
    theirs = {"library": "peft"}
    known = {name: Pair(name, name, "training", {}, theirs, (SPEED,)) for name in ("twice", "half")} | {
        "own": pair("own")
    }
    half = {"peak": 1.0}
    results = {
        name: {"rounds": [{"ours": {"step": 1.0} | half, "theirs": {"step": s} | half} for s in steps]}
        for name, steps in {"twice": (8.0, 4.0, 2.0), "half": (1.0,), "own": (9.0,)}.items()
    }
    speed, memory = over_all(known, results)
    assert (speed.median, speed.low, speed.high) == pytest.approx((2.0, 2**0.5, 8**0.5))
    assert speed.met
    assert memory.median == pytest.approx(1.0)
    results.pop("half")
    assert [r.median for r in over_all(known, results)] == [None, None]
