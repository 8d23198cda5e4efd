"""Adapter files that are not what they should be: an AdapterError that says what to do; the model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import bits, require_same_bits
from pegbox.checks.models import FAMILIES
from pegbox.core import Tuned
from pegbox.core.errors import AdapterError, CannotMix, MethodError, TargetError
from pegbox.core.files import CONFIG, TENSORS

Change = Callable[[Path], Any]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pegbox.tune(_model(), "lora", rank=4).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def _model(family: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family].build().eval()


def _refused(folder: Path, *words: str, model: nn.Module | None = None) -> None:
    model = _model() if model is None else model
    before = bits(model)
    with pytest.raises(AdapterError) as raised:
        pegbox.load(model, folder)
    for word in words:
        assert word in str(raised.value)
    require_same_bits(bits(model), before, "after a refusal")
    assert not any("forward" in m.__dict__ for m in model.modules())


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """The tensors' file again, with tensors and header changed in place."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    header = json.loads(metadata["pegbox"])
    change(tensors, header)
    save_file(tensors, folder / TENSORS, metadata=metadata | {"pegbox": json.dumps(header)})


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _as_peft(folder: Path) -> None:
    """Without what Pegbox notes beside: a file as PEFT writes it."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / TENSORS)


# -- what is no adapter -----------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "there is no such folder")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save(_model().state_dict(), tmp_path / "model.bin")
    _refused(tmp_path / "model.bin", "is a file", "none is read", "safe_serialization=True")


def test_a_pickled_adapter_is_not_read(saved: Path) -> None:
    (saved / TENSORS).unlink()
    torch.save({"weight": torch.zeros(1)}, saved / "adapter_model.bin")
    _refused(saved, "only adapter_model.bin", "none is read")


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    _refused(tmp_path / "whole", "holds a whole model", "model=")


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.99])
def test_a_truncated_file(saved: Path, share: float) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[: int(len(data) * share)])
    _refused(saved, TENSORS, "damaged")


def test_a_file_with_a_foreign_header(saved: Path) -> None:
    data = bytearray((saved / TENSORS).read_bytes())
    data[:8] = b"\xff" * 8
    (saved / TENSORS).write_bytes(bytes(data))
    _refused(saved, "damaged")


def test_values_that_are_not_finite(saved: Path) -> None:
    _rewrite(saved, lambda tensors, header: next(iter(tensors.values())).view(-1)[:1].fill_(float("inf")))
    _refused(saved, "not finite")


def test_whole_numbers_where_weights_should_be(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        key = sorted(tensors)[0]
        tensors[key] = tensors[key].to(torch.int64)

    _rewrite(saved, spoil)
    _refused(saved, "torch.int64 in the file", "torch.float32 in the model")


def test_half_precision_is_read(saved: Path) -> None:
    """Other tools save in the dtype of the model."""
    _rewrite(saved, lambda tensors, header: tensors.update({k: v.half() for k, v in tensors.items()}))
    tuned = pegbox.load(_model(), saved)
    assert {v.dtype for v in tuned.state().values()} == {torch.float32}


@pytest.mark.parametrize(("change", "word"), [("missing", "missing"), ("added", "unexpected")])
def test_keys_that_do_not_match(saved: Path, change: str, word: str) -> None:
    def spoil(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        key = sorted(tensors)[0]
        tensors.pop(key) if change == "missing" else tensors.update({f"{key}.more": torch.zeros(1)})

    _rewrite(saved, spoil)
    _refused(saved, word)


# -- what another version wrote ---------------------------------------------------------------------------------------


def test_a_newer_format(saved: Path) -> None:
    _rewrite(saved, lambda tensors, header: header.update(format=99))
    _refused(saved, "format 99", "newer", "pip install -U pegbox")


def test_an_unknown_method(saved: Path) -> None:
    _rewrite(saved, lambda tensors, header: header.update(method="lorra"))
    _refused(saved, "did you mean 'lora'")


def test_an_unknown_setting(saved: Path) -> None:
    _rewrite(saved, lambda tensors, header: header["settings"].update(ranc=4))
    _refused(saved, "did you mean 'rank'")


def test_an_unknown_kind_of_peft(saved: Path) -> None:
    _as_peft(saved)
    _configure(saved, peft_type="WONDER")
    _refused(saved, "peft_type 'WONDER'")


def test_a_setting_of_a_newer_peft(saved: Path) -> None:
    pytest.importorskip("peft")
    _as_peft(saved)
    _configure(saved, use_wonders=True, peft_version="99.0")
    _refused(saved, "use_wonders=True", "99.0", "pip install -U peft")


# -- another base -----------------------------------------------------------------------------------------------------


def test_another_base(saved: Path) -> None:
    _refused(saved, "another base", "fingerprint", model=_model(seed=5))


def test_a_base_of_another_shape(saved: Path) -> None:
    _as_peft(saved)  # a file of PEFT's has no fingerprint
    _refused(saved, "does not fit", model=_model("odd"))


def test_a_base_of_another_architecture(saved: Path) -> None:
    _as_peft(saved)
    _refused(saved, "does not fit this model", model=_model("bert"))


# -- what cannot be together ------------------------------------------------------------------------------------------


def test_beside_one_that_trains_the_base(saved: Path) -> None:
    tuned = pegbox.tune(_model(), "full")
    with pytest.raises(CannotMix, match="shares the model with no other"):
        pegbox.load(tuned, saved, name="second")
    assert tuple(tuned.adapters) == ("default",)


def test_under_a_name_that_is_taken(saved: Path) -> None:
    tuned = pegbox.load(_model(), saved)
    with pytest.raises(MethodError, match="choose another name"):
        pegbox.load(tuned, saved)
    assert tuple(tuned.adapters) == ("default",)


def test_a_refused_second_adapter_leaves_the_first(saved: Path) -> None:
    tuned = pegbox.load(_model(), saved)
    before = {k: v.clone() for k, v in tuned.state().items()}
    _rewrite(saved, lambda tensors, header: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(AdapterError, match="missing"):
        pegbox.load(tuned, saved, name="second")
    assert (tuple(tuned.adapters), tuned.active) == (("default",), ("default",))
    require_same_bits(dict(tuned.state()), before, "the first adapter")


class _Bare(nn.Module):
    """An architecture with nothing to attach to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize("method", ["lora", "bitfit", "series"])
def test_a_model_with_nothing_to_attach_to(method: str) -> None:
    model = _Bare()
    with pytest.raises(TargetError):
        pegbox.tune(model, method)
    assert model.scale.requires_grad
    assert not isinstance(model, Tuned)
