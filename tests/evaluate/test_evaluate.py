from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pegbox
from pegbox.core import files
from pegbox.core.errors import DataError
from pegbox.evaluate.evaluate import EvalSettings, evaluate

from . import tiny


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {k} of a text"}) + "\n" for k in range(20)))
    return str(path)


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "c.jsonl"
    names = ("bad", "fair", "good")
    path.write_text("".join(json.dumps({"text": f"row {k}", "label": names[k % 3]}) + "\n" for k in range(30)))
    return str(path)


def test_a_whole_model(bases: Path, classes: str, tmp_path: Path) -> None:
    found = evaluate(EvalSettings(model=str(bases / "bert"), data=classes, output=str(tmp_path / "n" / "out.json")))
    assert set(found.after) == {"accuracy", "macro_f1", "nll"}
    assert not found.before
    assert found.after["accuracy"].rows == 30
    assert found.after["nll"].half > 0
    written = json.loads((tmp_path / "n" / "out.json").read_text())
    assert written["after"]["accuracy"]["mean"] == found.after["accuracy"].mean


def test_before_is_the_base_and_change_their_difference(bases: Path, texts: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bases / "gpt2")
    tuned = pegbox.tune(base, "lora", rank=2)
    tiny.moved(tuned, 0.05)
    files.save(tuned, tmp_path / "a", objective="causal_lm")
    found = evaluate(EvalSettings(adapter=str(tmp_path / "a"), data=texts))
    plain = evaluate(EvalSettings(model=str(bases / "gpt2"), data=texts))
    assert found.before["nll"] == plain.after["nll"]
    assert found.after["nll"].mean != found.before["nll"].mean
    change = found.change["nll"]
    assert change.mean == pytest.approx(found.after["nll"].mean - found.before["nll"].mean)


def test_a_head_that_was_trained_has_no_before(bases: Path, classes: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(bases / "bert")
    tuned = pegbox.tune(base, "bitfit", also_train=("classifier",))
    labels = ["bad", "fair", "good"]
    files.save(tuned, tmp_path / "a", objective="sequence_classification", labels=labels)
    found = evaluate(EvalSettings(adapter=str(tmp_path / "a"), data=classes))
    assert not found.before
    assert any("classifier was trained with the adapter" in note for note in found.notes)


def test_data_that_does_not_fit(bases: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "label": "unheard"}\n{"text": "b", "label": "of"}\n')
    with pytest.raises(DataError, match="no row is left"):
        evaluate(EvalSettings(model=str(bases / "bert"), data=str(path)))


def test_it_is_the_same_on_the_same_rows(bases: Path, classes: str) -> None:
    torch.manual_seed(1)
    one = evaluate(EvalSettings(model=str(bases / "bert"), data=classes, batch_size=4))
    torch.manual_seed(2)
    two = evaluate(EvalSettings(model=str(bases / "bert"), data=classes, batch_size=30))
    assert one.after["accuracy"] == two.after["accuracy"]
