"""A whole comparison on a small BERT with random weights and rows that are easy to tell apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pegbox
from pegbox.core.errors import SettingsError
from pegbox.evaluate import compare as module
from pegbox.evaluate.bench import Bench
from pegbox.evaluate.compare import compare, majority
from pegbox.evaluate.compare_settings import built, compare_settings
from pegbox.evaluate.comparison import Comparison
from pegbox.evaluate.opened import open_adapter
from pegbox.evaluate.run_log import Finished, Run
from pegbox.train.trainer import Trainer

METHODS = ("lora", "bitfit", "full")


def rows(count: int, seed: int) -> str:
    draw = random.Random(seed)
    made = [(label, " ".join(draw.choices(words, k=3))) for k in range(count) for label, words in [SAID[k % 2]]]
    return "".join(json.dumps({"text": f"{text} {k}", "label": label}) + "\n" for k, (label, text) in enumerate(made))


SAID = [("bad", ["zzz", "yyy", "xxx"]), ("good", ["aaa", "bbb", "ccc"])]


@pytest.fixture
def values(bases: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text(rows(40, 0))
    (tmp_path / "test.jsonl").write_text(rows(20, 1))
    return {
        "model": str(bases / "bert"),
        "data": str(tmp_path / "train.jsonl"),
        "test": str(tmp_path / "test.jsonl"),
        "output": str(tmp_path / "out"),
        "methods": list(METHODS),
        "lora.rank": 2,
        "trials": 2,
        "seeds": 2,
        "max_steps": 3,
        "valid_share": 0.25,
        "max_length": 32,
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """Method, rate and seed of every training that is really made."""
    made: list[tuple[str, float, int]] = []
    own = Bench.train

    def train(self: Bench, method: Any, *, rate: float, seed: int, **rest: Any) -> Any:
        made.append((method.name(), rate, seed))
        return own(self, method, rate=rate, seed=seed, **rest)

    monkeypatch.setattr(Bench, "train", train)
    return made


def test_every_method_gets_the_same(values: dict[str, Any], trained: list[tuple[str, float, int]]) -> None:
    done = compare(compare_settings(values | {"warm_start": True}))
    for name in METHODS:
        mine = [(rate, seed) for n, rate, seed in trained if n == name]
        assert len(mine) == 2 + 2
        assert len({rate for rate, _ in mine[:2]}) == 2
        assert len({rate for rate, _ in mine[2:]}) == 1
        assert {seed for _, seed in mine[:2]}.isdisjoint({seed for _, seed in mine[2:]})
    names = [entry.name for entry in done.entries]
    assert names == [*METHODS, "majority class", "linear probe"]
    assert done.winner in METHODS
    lora, bitfit, full = done.entries[:3]
    assert bitfit.trained < lora.trained < full.trained
    assert bitfit.size < lora.size < full.size
    assert all(entry.quality.rows == 20 and entry.quality.seeds == 2 for entry in done.entries[:3])
    assert all(entry.seconds > 0 and entry.per_row > 0 for entry in done.entries[:3])
    assert done.entries[3].quality.mean == 0.5
    check_files(Path(values["output"]), done, values)


def check_files(output: Path, done: Comparison, values: dict[str, Any]) -> None:
    table = (output / "table.md").read_text()
    assert f"| **{done.winner}** |" in table
    assert "linear probe" in table
    assert "rates: lora 0.00056, 0.0018" in table
    results = json.loads((output / "results.json").read_text())
    assert [entry["name"] for entry in results["entries"]] == [entry.name for entry in done.entries]
    assert (output / "quality_against_cost.png").stat().st_size > 1000
    opened = open_adapter(output / "winner")
    assert opened.file.method == done.winner
    assert opened.tokenizer is not None
    assert opened.file.extra["labels"] == ["bad", "good"]


def test_nothing_is_made_twice(values: dict[str, Any], trained: list[tuple[str, float, int]]) -> None:
    first = compare(compare_settings(values))
    count = len(trained)
    again = compare(compare_settings(values))
    assert len(trained) == count
    assert again.entries == first.entries
    compare(compare_settings(values | {"methods": [*METHODS, "miss"], "miss.rank": 4}))
    assert {name for name, *_ in trained[count:]} == {"miss"}
    with pytest.raises(SettingsError, match="max_steps=3, not 4"):
        compare(compare_settings(values | {"max_steps": 4}))
    del values["lora.rank"]
    changed = values | {"max_steps": 4, "methods": "bitfit", "overwrite": True}
    assert len(compare(compare_settings(changed)).entries) == 3


def test_an_interrupted_comparison_goes_on(
    values: dict[str, Any], trained: list[tuple[str, float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = Trainer.train, iter(range(100))

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(compare_settings(values))
    before = trained[:4]
    trained.clear()
    done = compare(compare_settings(values))
    assert not set(before) & set(trained)
    assert len(trained) == 3 * 4 - 4
    whole = compare(compare_settings(values | {"output": f"{values['output']}2"}))
    assert [e.quality for e in done.entries] == [e.quality for e in whole.entries]


def test_runs_do_not_depend_on_what_ran_before(values: dict[str, Any]) -> None:
    """The base is the same for every run, whatever trained on it."""
    settings = compare_settings(values)
    methods = built(settings)
    bench = Bench(settings, methods, lambda line: None)

    def losses(name: str) -> dict[str, torch.Tensor]:
        made = bench.train(methods[name], rate=1e-2, seed=3, steps=3)
        state = {key: value.clone() for key, value in made.tuned.state().items()}
        bench.leave(made.tuned)
        return state

    alone = {name: losses(name) for name in METHODS}
    for name in reversed(METHODS):
        again = losses(name)
        assert all(torch.equal(again[key], value) for key, value in alone[name].items()), name


def test_a_head_that_starts_warm_is_the_probe(values: dict[str, Any]) -> None:
    settings = compare_settings(values | {"warm_start": True, "methods": "lora"})
    work = module._Work(settings, Silent())
    predictions = work._baselines()
    made = work.bench.train(work.methods["lora"], rate=1e-12, seed=0, steps=1)
    assert torch.equal(work.bench.predict(made.tuned, work.bench.test)["right"], predictions["linear probe"]["right"])


def test_the_smallest_of_those_that_validation_rows_hardly_tell_apart_wins(values: dict[str, Any]) -> None:
    work = module._Work(compare_settings(values), Silent())
    error = work._standard_error(0.8)
    assert error == pytest.approx((0.8 * 0.2 / len(work.bench.valid)) ** 0.5)

    def winner(**valid: float) -> str:
        sizes = {"lora": 20, "bitfit": 10, "full": 30}
        runs = {n: [Finished(Run(n, "{}", "seed", 1e-3, 1), v, sizes[n], 1.0)] for n, v in valid.items()}
        return work._winner(runs)

    assert winner(full=0.8, lora=0.8 - error / 2, bitfit=0.8 - 2 * error) == "lora"
    assert winner(full=0.8, lora=0.8, bitfit=float("nan")) == "lora"
    assert winner(full=0.8, lora=0.8 - 2 * error) == "full"


def test_language_models_are_compared_by_their_loss(
    bases: Path, tmp_path: Path, trained: list[tuple[str, float, int]]
) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {k} of a text" for k in range(40)))
    values = {"model": str(bases / "gpt2"), "data": str(tmp_path / "t.txt"), "output": str(tmp_path / "o")}
    values |= {"methods": "lora,prompt_tuning", "trials": 1, "seeds": 2, "max_steps": 2, "prompt_tuning.tokens": 2}
    done = compare(compare_settings(values | {"max_length": 32, "limit": 40}))
    assert done.metric == "nll"
    assert done.winner == min(done.entries, key=lambda e: e.quality.mean).name or len(done.entries) == 2
    assert "+" not in done.cells(done.entries[0])[1]


def test_what_cannot_be_packed_is_refused_whoever_comes_first(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {k} of a text" for k in range(40)))
    values = {"model": str(bases / "llama"), "data": str(tmp_path / "t.txt"), "output": str(tmp_path / "o")}
    with pytest.raises(pegbox.PegboxError, match="prompt_tuning puts tokens"):
        compare(compare_settings(values | {"methods": "lora,prompt_tuning", "packing": True, "max_steps": 1}))


def test_rows_that_cannot_be_judged_are_told(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with Path(values["test"]).open("a") as file:
        file.write('{"text": "what", "label": "unheard of"}\n')
    settings = compare_settings(values)
    Bench(settings, built(settings), print)
    assert "test       left out: 1 " in capsys.readouterr().out


class Silent:
    """Progress that shows nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"methods": "lora,lora"}, "different names"),
        ({"dora.rank": 2}, "'dora' is not compared"),
        ({"rates.dora": 1}, "'dora' is not compared"),
        ({"lora.ranc": 2}, "did you mean 'rank'"),
        ({"methods": "lora,nothing"}, "unknown method 'nothing'"),
        ({"valid_share": 0.0}, "must be above 0"),
        ({"objective": "regression"}, "."),
    ],
)
def test_mistakes(values: dict[str, Any], changed: dict[str, Any], told: str) -> None:
    with pytest.raises(pegbox.PegboxError, match=told):
        compare(compare_settings({k: v for k, v in values.items() if k != "lora.rank"} | changed))


def test_majority() -> None:
    logits = majority(torch.tensor([0, 2, 2]), rows=4, classes=3)
    assert logits.argmax(-1).tolist() == [2] * 4


def test_a_method_is_there_twice_under_labels() -> None:
    settings = compare_settings(
        {"model": "m", "data": "d", "methods": "lora, pissa=lora, dora", "pissa.start": "pissa", "lora.rank": 4}
    )
    found = {label: (type(method).__name__, method) for label, method in built(settings).items()}
    assert {label: name for label, (name, _) in found.items()} == {"lora": "LoRA", "pissa": "LoRA", "dora": "DoRA"}
    assert (found["pissa"][1].start, found["lora"][1].rank) == ("pissa", 4)  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="different names"):
        compare_settings({"model": "m", "data": "d", "methods": "lora,lora=dora"})


def test_methods_of_tasks_are_compared_with_others(values: dict[str, Any]) -> None:
    for name in ("data", "test"):
        path = Path(values[name])
        told = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"task": row["label"]}) + "\n" for row in told))
    settings = compare_settings(values | {"methods": "mhr,lora", "mhr.rank": 2, "max_steps": 2})
    done = compare(settings)
    labels = sorted({row["label"] for row in told})
    assert Bench(settings, built(settings), print).methods["mhr"].tasks_known() == tuple(labels)
    assert {entry.name for entry in done.entries} >= {"mhr", "lora"}
