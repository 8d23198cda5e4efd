"""Starts of low-rank factors: what they are, what PEFT makes of them, and the files of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pegbox
from pegbox.checks.lab import bits, require_same_bits, shake
from pegbox.checks.models import FAMILIES, text
from pegbox.core import files
from pegbox.core.errors import AdapterError, SettingsError
from pegbox.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it

FROM_BASE = ["pissa", "olora"]
METHODS = ["lora", "dora"]


def family(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


def one_matrix(out: int = 12, in_: int = 10) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(in_, out))
    return model, model[0].weight.detach().clone()


@pytest.mark.parametrize("settings", [{}, {"rslora": True}])
def test_pissa_takes_the_largest_singular_values(settings: dict[str, Any]) -> None:
    """s B_0 A_0 is the best approximation of W of rank r, its singular values split evenly."""
    model, w = one_matrix()
    tuned = pegbox.tune(model, "lora", rank=3, alpha=6.0, start="pissa", targets=".*", **settings)
    graft: Any = tuned.sites["0"].chain[0]
    u, s, vt = torch.linalg.svd(w)
    assert torch.allclose(graft.scale * graft.b @ graft.a, u[:, :3] * s[:3] @ vt[:3], atol=1e-4)
    assert torch.allclose(graft.a @ graft.a.T, graft.b.T @ graft.b, atol=1e-4)


def test_a_fast_svd_comes_near() -> None:
    """What is left of W is hardly more than what the best approximation leaves."""
    model, w = one_matrix(60, 50)
    graft: Any = (
        pegbox.tune(model, "lora", rank=3, start="pissa", start_settings={"niter": 8}, targets=".*").sites["0"].chain[0]
    )
    left = (w - graft.scale * graft.b @ graft.a).norm()
    assert left < 1.01 * torch.linalg.svdvals(w)[3:].norm()


def test_olora_takes_rows_and_columns_of_qr() -> None:
    model, w = one_matrix()
    graft: Any = pegbox.tune(model, "lora", rank=3, start="olora", targets=".*").sites["0"].chain[0]
    q, r = torch.linalg.qr(w)
    assert torch.allclose(graft.b @ graft.a, q[:, :3] @ r[:3], atol=1e-5)
    assert torch.allclose(graft.b.T @ graft.b, torch.eye(3), atol=1e-5)


def test_gaussian() -> None:
    """A from N(0, 1 / r^2), B = 0."""
    graft: Any = (
        pegbox.tune(one_matrix(64, 400)[0], "lora", rank=64, start="gaussian", targets=".*").sites["0"].chain[0]
    )
    assert graft.a.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert not graft.b.any()
    assert graft.a0 is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", FROM_BASE)
def test_the_base_stays_and_the_start_is_the_base(start: str, method: str) -> None:
    """Bit for bit: the change is a product with zeros.  (DoRA divides by a norm, so only nearly.)"""
    model = family("llama")
    before, want = bits(model), model(**text(0)).logits
    tuned = pegbox.tune(model, method, rank=4, start=start)
    require_same_bits(bits(model), before, "after tune")
    logits = tuned(**text(0)).logits
    assert torch.equal(logits, want) if method == "lora" else torch.allclose(logits, want, atol=1e-5)
    shake(tuned)
    assert not torch.allclose(tuned(**text(0)).logits, want, atol=1e-2)
    require_same_bits(bits(model), before, "after a change")


@pytest.mark.parametrize("start", FROM_BASE)
def test_small_changes_survive_bfloat16(start: str) -> None:
    """The change is no difference of large numbers: as near to float32 as plain LoRA's is."""
    x = torch.randn(64, 32)
    errors = {}
    for name in ("default", start):
        model, _ = one_matrix(48, 32)
        tuned = shake(pegbox.tune(model, "lora", rank=4, start=name, targets=".*"), size=1e-3)
        graft: Any = tuned.sites["0"].chain[0]
        down, up = (factor.detach() for factor in graft.difference())
        exact = x @ down.T @ up.T
        low = (x.bfloat16() @ down.bfloat16().T @ up.bfloat16().T).float()
        errors[name] = ((low - exact).norm() / exact.norm()).item()
    assert errors[start] < 2 * errors["default"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("start", "rslora"), [("pissa", False), ("pissa", True), ("olora", False)])
def test_first_steps_are_pefts(start: str, rslora: bool, method: str) -> None:
    """PEFT takes the part out of the base; the functions, their gradients and three steps are the same."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=start,  # type: ignore[arg-type]
        use_rslora=rslora,
        use_dora=method == "dora",
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    theirs: Any = get_peft_model(family("llama"), config).eval()
    ours = pegbox.tune(
        family("llama"), method, rank=4, alpha=6.0, start=start, rslora=rslora, targets="q_proj,v_proj,down_proj"
    ).eval()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (theirs, ours)]
    for step in range(3):
        outs = [m(**text(step)) for m in (theirs, ours)]
        assert torch.allclose(outs[0].logits, outs[1].logits, atol=1e-5), step
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.loss.backward()
        _require_same_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()


def _require_same_gradients(ours: Any, theirs: Any) -> None:
    names = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    parameters = dict(theirs.named_parameters())
    for key, mine in ours.trainable().items():
        path, _, leaf = key.removeprefix("graft.").rpartition(".")
        other = parameters[f"base_model.model.{path}.{names[leaf]}"]
        assert torch.allclose(mine.grad, other.grad, atol=1e-5), key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("start", "rslora"), [("pissa", False), ("olora", True)])
def test_the_file_is_a_lora_of_twice_the_rank(tmp_path: Path, start: str, rslora: bool, method: str) -> None:
    """PEFT loads it on the original base; here it comes back with the factors apart, to the last bit."""
    from peft import PeftModel

    tuned = shake(pegbox.tune(family("llama"), method, rank=4, alpha=6.0, start=start, rslora=rslora)).eval()
    tuned.save(tmp_path)
    want = tuned(**text(0)).logits
    theirs: Any = PeftModel.from_pretrained(family("llama"), tmp_path).eval()
    assert theirs.peft_config["default"].r == 8
    assert torch.allclose(theirs(**text(0)).logits, want, atol=2e-5)
    again = pegbox.load(family("llama"), tmp_path)
    assert again.method == tuned.method
    require_same_bits(again.state(), tuned.state(), "loaded")


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("start", FROM_BASE)
def test_pefts_converted_file_loads(tmp_path: Path, start: str) -> None:
    """`path_initial_model_for_weight_conversion` writes a LoRA of rank 2 r against the original base."""
    theirs = _peft(start)
    before = copy.deepcopy(theirs.peft_config["default"])
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"] = before
    _shake(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded: Any = pegbox.load(family("llama"), tmp_path / "converted")
    assert (loaded.method.rank, loaded.method.start) == (8, "default")
    assert torch.allclose(loaded(**text(0)).logits, theirs(**text(0)).logits, atol=2e-5)


@pytest.mark.parametrize("start", FROM_BASE)
def test_pefts_unconverted_file_loads(tmp_path: Path, start: str) -> None:
    """It holds A and B alone; A_0 and B_0 come from the base, as they do in PEFT."""
    theirs = _peft(start)
    _shake(theirs)
    theirs.save_pretrained(tmp_path)
    loaded: Any = pegbox.load(family("llama"), tmp_path)
    assert (loaded.method.rank, loaded.method.start) == (4, start)
    assert torch.allclose(loaded(**text(0)).logits, theirs(**text(0)).logits, atol=2e-5)


def test_pefts_drawn_start_is_refused(tmp_path: Path) -> None:
    """What `pissa_niter_N` took out of the base was drawn, and is not in the file."""
    _peft("pissa_niter_4").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="init_lora_weights='pissa_niter_4'"):
        files.read(tmp_path, [LoRA])
    with pytest.raises(AdapterError):
        pegbox.load(family("llama"), tmp_path)


def test_iterations_of_another_start_are_refused() -> None:
    with pytest.raises(SettingsError, match="start default has no setting 'niter'"):
        pegbox.tune(family("llama"), "lora", start_settings={"niter": 4})


def _peft(start: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=["q_proj", "down_proj"])  # type: ignore[arg-type]
    return get_peft_model(family("llama"), config).eval()


@torch.no_grad()
def _shake(model: Any) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
