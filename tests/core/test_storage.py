"""Matrices that are kept quantised: decoded on demand, never kept decoded, merged exactly or encoded anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import Sum
from pegbox.checks import kinds
from pegbox.checks.lab import bits, require_same_bits, shake
from pegbox.core import storage
from pegbox.core.errors import AdapterError, TargetError
from pegbox.core.fingerprint import fingerprint

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "miss": {"rank": 8},
    "bat": {"rank": 4},
    "bitfit": {},
}
WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH, bias=False)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        out: Tensor = self.norm(x + second(first(x).tanh()))
        return out


def _torchao(bits_: int) -> Any:
    def change(model: nn.Module) -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        four = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
        config = Int8WeightOnlyConfig(set_inductor_config=False) if bits_ == 8 else four
        quantize_(model, config, filter_fn=lambda m, path: isinstance(m, nn.Linear))
        return model

    return change


KINDS = {
    "nf4": ("bitsandbytes", kinds.nf4),
    "int8": ("bitsandbytes", kinds.int8),
    "torchao int8": ("torchao", _torchao(8)),
    "torchao int4": ("torchao", _torchao(4)),
}


def built(kind: str) -> nn.Module:
    package, change = KINDS[kind]
    pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    model: nn.Module = change(Block()).eval()
    return model


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(X)
    return out


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base_rounding(kind: str) -> float:
    return 0.05 if kind == "int8" else 1e-5  # bitsandbytes' eight bits round the inputs too


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_method(kind: str, name: str, tmp_path: Path) -> None:
    model = built(kind)
    before, base = bits(model), output(model)
    tuned = pegbox.tune(model, name, **METHODS[name])
    torch.testing.assert_close(output(tuned), base, rtol=0, atol=base_rounding(kind))
    shake(tuned)
    want = output(tuned)
    assert (want - base).abs().max() > 1e-2
    tuned(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trainable().values())
    torch.testing.assert_close(
        output(tuned.merge()), want, rtol=1e-5, atol=base_rounding(kind) if name == "bitfit" else 1e-5
    )
    assert torch.equal(output(tuned.unmerge()), want)
    tuned.save(tmp_path)
    assert torch.equal(output(pegbox.load(built(kind), tmp_path)), want)
    with tuned.disabled():
        assert torch.equal(output(tuned), base)
    require_same_bits(bits(tuned.detach()), before, "the base")
    assert torch.equal(output(model), base)


def test_what_is_read_is_the_decoded_matrix(kind: str) -> None:
    tuned = pegbox.tune(built(kind), "lora", rank=2, targets="layers.0")
    site = tuned.sites["layers.0"]
    torch.manual_seed(0)
    exact = Block().layers[0].weight
    assert site.quantised is not None
    assert site.shape == site.read("weight").shape == exact.shape
    assert (site.read("weight") - exact).norm() / exact.norm() < 0.15


@contextmanager
def kept_tensors() -> Iterator[list[Tensor]]:
    """Inside, every tensor that autograd keeps for a backward."""
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_decoded_matrix_is_not_kept(kind: str, dropout: float) -> None:
    tuned = shake(pegbox.tune(built(kind), "lora", rank=4, dropout=dropout)).train()
    x = X.clone().requires_grad_()
    with kept_tensors() as kept:
        y = tuned(x)
    assert kept
    assert max(t.numel() for t in kept if t.is_floating_point()) < 128 * WIDTH
    y.sum().backward()
    plain = copy.deepcopy(tuned.merge()) if not dropout else None
    if plain is not None:
        tuned.unmerge()
        other = X.clone().requires_grad_()
        plain(other).sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_encoding_anew_tells_how_far_it_moved(kind: str) -> None:
    model = built(kind)
    before = bits(model)
    tuned = shake(pegbox.tune(model, "lora", rank=4))
    want = output(tuned)
    merged = tuned.merge(requantise=True)
    assert set(storage.quantised_parameters(merged)) == {"layers.0.weight", "layers.1.weight"}
    assert set(tuned.merge_drift) == {"layers.0", "layers.1"}
    for drift in tuned.merge_drift.values():
        assert 0 < drift.of_matrix < 0.15
        assert drift.of_change > drift.of_matrix
    assert 0 < (output(merged) - want).abs().max() < 1.5
    assert torch.equal(output(tuned.unmerge()), want)
    require_same_bits(bits(tuned.detach()), before, "the base")


def test_an_exact_merge_leaves_plain_layers(kind: str) -> None:
    tuned = shake(pegbox.tune(built(kind), "lora", rank=4))
    merged = tuned.merge()
    assert not storage.quantised_parameters(merged)
    assert {type(m) for m in merged.layers} == {nn.Linear}  # type: ignore[union-attr]
    assert not tuned.merge_drift


def test_a_bfloat16_model_stays_one(kind: str) -> None:
    tuned = shake(pegbox.tune(built(kind), "lora", rank=4))
    want = output(tuned)
    half = shake(pegbox.tune(built(kind).bfloat16(), "lora", rank=4))
    with torch.no_grad():
        y = half(X.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() / want.norm() < 3e-2
    assert {p.dtype for p in half.merge().parameters()} == {torch.bfloat16}


def test_sums_and_rows(kind: str) -> None:
    method = pegbox.method("lora", rank=4)
    tuned = shake(pegbox.tune(built(kind), method, name="a"), seed=1)
    tuned.add("b", method)
    shake(tuned, seed=2).eval()
    alone = {"a": output(tuned.use("a")), "b": output(tuned.use("b")), None: output(built(kind))}
    torch.testing.assert_close(output(tuned.use(Sum(a=1.0, b=0.0))), alone["a"], rtol=1e-5, atol=1e-5)
    names = ["a", None, "b", "b", "a"]
    with tuned.rows(names):
        have = output(tuned)
    for row, chosen in enumerate(names):
        torch.testing.assert_close(have[row], alone[chosen][row], rtol=1e-5, atol=1e-5)


def test_another_quantised_base_is_refused(kind: str, tmp_path: Path) -> None:
    model = built(kind)
    mark = fingerprint(model)
    output(model)
    assert fingerprint(model) == mark  # bitsandbytes moves its scales when first called
    pegbox.tune(model, "lora", rank=2).save(tmp_path)
    torch.manual_seed(1)
    other = KINDS[kind][1](Block())
    assert fingerprint(other) != mark
    with pytest.raises(AdapterError, match="another base"):
        pegbox.load(other, tmp_path)


def test_training_quantised_tensors_is_refused(kind: str) -> None:
    model = built(kind)
    before = bits(model)
    with pytest.raises(TargetError, match=r"full trains the base's own tensors, and layers\.0\.weight is kept as"):
        pegbox.tune(model, "full")
    with pytest.raises(TargetError, match=r"also_train copies 'layers\.1', and layers\.1\.weight is kept as"):
        pegbox.tune(model, "lora", rank=2, targets="layers.0", also_train=("layers.1",))
    assert not any("forward" in m.__dict__ for m in model.modules())
    require_same_bits(bits(model), before, "the base")
    assert pegbox.tune(model, "full", targets="norm").trainable()


def test_what_bitsandbytes_repacks_is_read_all_the_same() -> None:
    """On a processor with bf16 units its modules change their codes and scales when first called in eval."""
    model: Any = built("nf4")
    exact, mark = storage.decoded(model.layers[0], "weight"), fingerprint(model)
    for layer in model.layers:
        layer.support_avx512bf16_for_cpu = type(layer)(4, 4).support_avx512bf16_for_cpu
    tuned = pegbox.tune(model, "bitfit", targets="norm")
    with tuned.disabled():
        output(tuned)
    assert torch.equal(storage.decoded(model.layers[0], "weight"), exact)  # not while adapters are on it
    output(tuned.detach())
    torch.testing.assert_close(storage.decoded(model.layers[0], "weight"), exact, rtol=1e-2, atol=1e-2)
    assert fingerprint(model) == mark
    later = shake(pegbox.tune(model, "lora", rank=4))
    want = output(later)
    torch.testing.assert_close(output(later.merge()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
def test_an_exported_model_is_plain_and_equal(targets: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from pegbox.checks.models import llama
    from pegbox.evaluate import parity

    torch.manual_seed(0)
    model: Any = kinds.nf4(llama()).eval()
    before = bits(model)
    parity.gate(shake(pegbox.tune(model, "lora", rank=4, targets=targets)))  # raises where a reloaded model differs
    require_same_bits(bits(model), before, "the base")
