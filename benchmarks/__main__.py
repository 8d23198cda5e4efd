"""Run the pairs, keep what they gave, write the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.chat import DATA
from benchmarks.pairs import Pair, pairs, run
from benchmarks.ratios import Reading
from benchmarks.report import render, verdict
from pegbox.core.errors import did_you_mean

RESULTS = Path("benchmarks/results.json")
PAGE = Path("docs/benchmarks.md")


def main() -> int:
    """0 if every bar of the pairs that ran is met, 1 if one is missed, 2 for a name that is no pair."""
    known = pairs()
    options = _parse()
    unknown = next((name for name in options.pairs if name not in known), None)
    if unknown is not None:
        print(f"no pair {unknown!r}{did_you_mean(unknown, known)}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{pair.name:<14} {pair.title}" for pair in known.values()))
        return 0
    if options.report:
        return _write(known, _results())
    chosen = [known[name] for name in options.pairs or known]
    if options.rounds:
        chosen = [dataclasses.replace(pair, rounds=options.rounds) for pair in chosen]
    missed = [pair.name for pair in chosen if not _run(pair)]
    _write(known, _results())
    print(f"\n{PAGE} written; " + (f"missed: {', '.join(missed)}" if missed else "every bar met"))
    return int(bool(missed))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("pairs", nargs="*", help="pairs to run; all if none")
    parser.add_argument("--rounds", type=int, help="rounds of each pair, instead of the pair's own number")
    parser.add_argument("--list", action="store_true", help="name the pairs and stop")
    parser.add_argument("--report", action="store_true", help="write the page from kept results and stop")
    return parser.parse_args()


def _run(pair: Pair) -> bool:
    """Run one pair, keep its results, and say how it did."""
    if pair.kind == "chat" and not DATA.exists():
        print(f"{pair.name}: shared data absent ({DATA}), not run", flush=True)
        return False
    start = time.perf_counter()
    result = run(pair, lambda line: print(line, flush=True))
    _keep(pair.name, result)
    readings = [Reading.of(bar, result["rounds"]) for bar in pair.bars]
    for reading in readings:
        print(f"  {reading.bar.what}: {reading} {reading.bar} {verdict(reading)}".rstrip())
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return all(reading.met for reading in readings)


def _results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _keep(name: str, result: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(_results() | {name: result}, indent=1) + "\n")


def _write(known: dict[str, Pair], results: dict[str, Any]) -> int:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(known, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
