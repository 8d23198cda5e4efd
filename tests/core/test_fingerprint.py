"""Whether a base is the one of training, however it was kept then and is kept now."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_storage import KINDS, Block, built, output
from torch import nn

import pegbox
from pegbox.checks.lab import shake
from pegbox.core import files, storage
from pegbox.core.errors import AdapterError
from pegbox.core.fingerprint import BaseRecord, fingerprint
from pegbox.core.storage import Kept


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Pegbox warned of, and not the libraries of quantisers."""
    return [record.getMessage() for record in caplog.records if record.name == "pegbox"]


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Block().eval()


def nearly(kind: str) -> float:
    """What is lost by keeping a matrix in this way, at most."""
    return 0.02 if kind.endswith("int8") else 0.2


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(model: nn.Module, folder: Path) -> Path:
    shake(pegbox.tune(model, "lora", rank=4)).save(folder)
    return folder


def changed(path: str, by: float) -> nn.Module:
    """The plain base with one tensor that is another."""
    model = plain()
    with torch.no_grad():
        model.get_parameter(path).add_(by * torch.randn(model.get_parameter(path).shape))
    return model


def test_trained_quantised_loaded_plain(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The base is encoded as it was in training: the same one is known, and how far it is off is measured."""
    base = built(kind)
    exact = {path: storage.decoded(base.get_submodule(path), "weight").float() for path in ("layers.0", "layers.1")}
    saved(base, tmp_path)
    tuned = pegbox.load(plain(), tmp_path)
    drift = tuned.adapter().base_drift
    assert drift is not None
    assert drift.proven
    assert drift.drifts.of.keys() == exact.keys()
    for path, was in exact.items():
        here = tuned.model.get_submodule(path).weight.detach()
        assert drift.drifts.of[path] == pytest.approx(float((here - was).norm() / was.norm()), rel=1e-4)
        assert 0 < drift.drifts.of[path] < nearly(kind)
    (line,) = told(caplog)
    assert f"trained on a base kept as {storage.name(base.layers[0], 'weight')}" in line  # type: ignore[index]
    assert str(drift.drifts) in line
    assert "\n" not in line


def test_trained_plain_loaded_quantised(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The plain numbers are gone: what can still be compared is, and the warning says that the rest cannot."""
    saved(plain(), tmp_path)
    drift = pegbox.load(built(kind), tmp_path).adapter().base_drift
    assert drift is not None
    assert not drift.proven
    assert 0 < drift.drifts.largest < nearly(kind)
    (line,) = told(caplog)
    assert "can only be told to be near" in line


def test_from_one_quantisation_to_another(kind: str, tmp_path: Path) -> None:
    saved(built(kind), tmp_path)
    other = next(name for name in KINDS if name != kind)
    drift = pegbox.load(built(other), tmp_path).adapter().base_drift
    assert drift is not None
    assert not drift.proven


@pytest.mark.parametrize(
    ("path", "named"),
    [("layers.0.weight", r"layers\.0\.weight has other values"), ("norm.bias", "norm.bias has other")],
)
def test_another_base_is_still_refused(kind: str, path: str, named: str, tmp_path: Path) -> None:
    other = changed(path, 0.02)
    with pytest.raises(AdapterError, match=rf"another base .*{named}"):
        pegbox.load(other, saved(built(kind), tmp_path))
    assert "forward" not in other.layers[0].__dict__  # type: ignore[index]
    with pytest.raises(AdapterError, match="another base"):
        pegbox.load(KINDS[kind][1](plain(1)), saved(plain(), tmp_path / "plain"))


def test_a_difference_too_rare_to_be_sampled_is_in_a_hash(tmp_path: Path) -> None:
    saved(built("nf4"), tmp_path)
    other = plain()
    with torch.no_grad():
        other.norm.weight[3] = 2.0  # type: ignore[index,union-attr]
    with pytest.raises(AdapterError, match="kept as plain numbers differ"):
        pegbox.load(other, tmp_path)
    with pytest.raises(AdapterError, match="another base"):
        pegbox.load(other, saved(plain(), tmp_path / "plain"))


def test_a_code_or_two_may_be_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another device or another version of the library encodes a number half-way between two codes otherwise."""
    made = BaseRecord.of(built("nf4"))
    for count, fits in ((1, True), (3, False)):
        values = made.values.clone()
        values[made.how.index(0), :count] += 0.01
        moved = BaseRecord.from_json(made.to_json() | {"values": _coded(values)}, "another")
        assert moved is not None
        if fits:
            assert moved.compare(built("nf4")) is None
        else:
            with pytest.raises(AdapterError, match="3 of 16 values of its matrices differ"):
                moved.compare(built("nf4"))


def _coded(values: torch.Tensor) -> str:
    return base64.b64encode(values.view(torch.int16).numpy().tobytes()).decode()


def test_other_names_or_shapes_are_refused(tmp_path: Path) -> None:
    saved(built("nf4"), tmp_path)
    other: Any = plain()
    other.layers.append(nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="names or shapes of its parameters differ"):
        pegbox.load(other, tmp_path)


def test_transformers_own_linear_layer_is_known_turned(tmp_path: Path) -> None:
    """bitsandbytes keeps GPT-2's Conv1D, (in, out), as (out, in)."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    saved(GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=four), tmp_path / "adapter")
    tuned = pegbox.load(GPT2LMHeadModel.from_pretrained(tmp_path), tmp_path / "adapter")
    drift = tuned.adapter().base_drift
    assert drift is not None
    assert drift.proven
    assert len(drift.drifts.of) == 4


def test_without_the_library_what_can_be_compared_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(built("nf4"), tmp_path)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    drift = pegbox.load(plain(), tmp_path).adapter().base_drift
    assert drift is not None
    assert not drift.proven
    assert "bitsandbytes" in str(drift)


def test_numbers_of_half_precision_are_not_encoded_for_those_of_float32(tmp_path: Path) -> None:
    saved(built("nf4"), tmp_path)
    drift = pegbox.load(plain().bfloat16(), tmp_path).adapter().base_drift
    assert drift is not None
    assert not drift.proven


def test_files_without_a_record_load_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(built("nf4"), tmp_path)
    with safe_open(tmp_path / files.TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["pegbox"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for said in (None, {"kept": "in a later form"}):
        older = {key: value for key, value in header.items() if key != "base_record"} | ({"base_record": said})
        save_file(tensors, tmp_path / files.TENSORS, metadata={"pegbox": json.dumps(older)})
        output(pegbox.load(built("nf4"), tmp_path))
        with pytest.raises(AdapterError, match="does not say how its base was kept"):
            pegbox.load(plain(), tmp_path)
    assert not told(caplog)


def test_a_record_is_what_a_file_gives_back() -> None:
    made = BaseRecord.of(built("nf4"))
    again = BaseRecord.from_json(json.loads(json.dumps(made.to_json())), made.fingerprint)
    assert again is not None
    assert made.fingerprint == fingerprint(built("nf4"))
    assert made.kept == (Kept("nf4", "float32", 64, True),)
    assert (again.names, again.plain, again.kept, again.how) == (made.names, made.plain, made.kept, made.how)
    assert torch.equal(again.values, made.values)


def test_an_adapter_that_fits_says_nothing(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert pegbox.load(built(kind), saved(built(kind), tmp_path)).adapter().base_drift is None
    assert not told(caplog)
