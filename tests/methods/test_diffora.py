"""DiffoRA: its search for the modules that get a LoRA, and what is shared by the others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

import pegbox
from pegbox.checks.lab import bits, require_same_bits, shake
from pegbox.checks.models import text
from pegbox.core import Tuned
from pegbox.core.calibration import Data
from pegbox.core.errors import MethodError, SettingsError
from pegbox.core.gate_search import HELD, GateSearch, largest, pairs
from pegbox.core.method import block_of
from pegbox.core.shared_pairs import Pairs, SharedGraft
from pegbox.data.collate import PadCollator
from pegbox.data.encoded import Encoded
from pegbox.methods.diffora import CandidateGraft, DiffoRA
from pegbox.train import Callback, Trainer

from .tiny import family

LAYERS, EACH = 2, 7  # q, k, v, o, gate, up, down
FAST: dict[str, Any] = {"rank": 2, "alpha": 6.0, "search_steps": 6, "factor_rate": 0.02, "gate_rate": 0.05}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [{**text(k), "labels": text(k)["input_ids"]} for k in range(count)]


def searched(count: int = 4, *, model: Any = None, **settings: Any) -> Tuned:
    tuned = pegbox.tune(model or family("llama"), "diffora", **FAST | settings)
    Callback(tuned, save=False).calibrate(batches(count))
    return tuned.eval()


def method_of(tuned: Tuned) -> DiffoRA:
    method = tuned.method
    assert isinstance(method, DiffoRA)
    return method


def grafts(tuned: Tuned) -> dict[str, Any]:
    return {path: site.chain[0] for path, site in tuned.sites.items()}


def pairs_in(tuned: Tuned) -> Pairs:
    shared = tuned.adapter().shared
    assert isinstance(shared, Pairs)
    return shared


def search_on(tuned: Tuned, **settings: Any) -> GateSearch:
    found = {path: graft for path, graft in grafts(tuned).items() if isinstance(graft, CandidateGraft)}
    layers = [block_of(path, tuned.anatomy) for path in found]
    return GateSearch(tuned, "default", found, layers, **{"weight_rate": 0.02, "gate_rate": 0.05} | settings)


# -- both phases ---------------------------------------------------------------------------------------------------


def test_both_phases_start_as_the_base_and_leave_it_alone() -> None:
    model = family("llama")
    before, want = bits(model), model(**text(0)).logits
    tuned = pegbox.tune(model, "diffora", **FAST)
    modes = {name: module.training for name, module in model.named_modules()}
    assert torch.equal(tuned(**text(0)).logits, want)
    Callback(tuned, save=False).calibrate(batches())
    assert torch.equal(tuned(**text(0)).logits, want)
    require_same_bits(bits(model), before, "the base")
    assert all(p.grad is None for p in tuned.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert tuned.active == ("default",)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_before_the_search_it_is_lora() -> None:
    ours, lora = (pegbox.tune(family("llama"), name, rank=2, alpha=6.0) for name in ("diffora", "lora"))
    require_same_bits(ours.state(), lora.state(), "the adapter")


def test_it_looks_at_data_while_nothing_is_chosen() -> None:
    assert DiffoRA().calibrates()
    assert not DiffoRA(chosen=()).calibrates()
    assert not DiffoRA(chosen=(Q,)).calibrates()
    assert DiffoRA(chosen=(Q,), start="eva").calibrates()
    assert not Callback(searched(), save=False).needs_data
    tuned = pegbox.tune(family("llama"), "diffora", chosen=(Q,), **FAST)
    before = tuned.adapter()
    Callback(tuned, save=False).calibrate(batches())
    assert tuned.adapter() is before


def test_no_gate_is_left() -> None:
    tuned = searched()
    keys = {key.rpartition(".")[2] for key in tuned.state()}
    assert keys == {"a", "b"}
    assert all(graft.gate is None for graft in grafts(tuned).values() if isinstance(graft, CandidateGraft))
    assert set(map(id, tuned.trainable().values())) == {id(p) for p in tuned.adapters.parameters()}
    method = method_of(tuned)
    assert list(method.gates) == list(pegbox.tune(family("llama"), "lora").sites)
    assert all(gate == round(gate, 4) and 0 < gate < 1 for gate in method.gates.values())
    assert len(set(method.gates.values())) > 5


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"order": 2}])
def test_a_search_is_reproducible_and_leaves_the_generator_alone(settings: dict[str, Any]) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tuned = searched(**settings)
        found.append((tuned.method, tuned.state()))
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0][0] == found[1][0]
    require_same_bits(found[0][1], found[1][1], "the adapter")


def test_an_error_in_the_search_leaves_no_gate() -> None:
    tuned, seen = pegbox.tune(family("llama"), "diffora", **FAST), itertools.count()

    def loss(model: Any, batch: Any) -> Tensor:
        if next(seen) == 3:
            raise RuntimeError("out of memory")
        found: Tensor = model(**batch).loss
        return found

    with pytest.raises(RuntimeError, match="out of memory"):
        Callback(tuned, save=False).calibrate(batches(), loss)
    assert all(graft.gate is None for graft in grafts(tuned).values())
    assert all(p.grad is None for p in tuned.parameters())


def test_losses_that_are_not_finite_are_told() -> None:
    tuned = pegbox.tune(family("llama"), "diffora", **FAST)
    with pytest.raises(MethodError, match="not finite"):
        Callback(tuned, save=False).calibrate(batches(), lambda model, batch: model(**batch).loss * float("nan"))


# -- the search ----------------------------------------------------------------------------------------------------


def gate_gradient(search: GateSearch) -> Tensor | None:
    return search.logits.grad


def test_gates_and_factors_have_gradients_of_their_own_batches_alone() -> None:
    """By half-steps; the factors' is the plain gradient on the first batch, under the gates as they are."""
    tuned = shake(pegbox.tune(family("llama"), "diffora", **FAST))
    search, data, (first, second) = search_on(tuned), Data(batches(2)), batches(2)
    search.logits.data.normal_(generator=torch.Generator().manual_seed(0))
    for graft, gate in zip(grafts(tuned).values(), search.gates().detach(), strict=True):
        graft.gate = gate
    want = torch.autograd.grad(tuned(**first).loss, search.weights)

    search.weight_step(data, first)
    assert gate_gradient(search) is None
    for p, gradient in zip(search.weights, want, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    before = [p.detach().clone() for p in search.weights]
    search.gate_step(data, first, second)
    assert all(torch.equal(p, b) for p, b in zip(search.weights, before, strict=True))
    assert all(p.grad is None for p in search.weights)
    found = gate_gradient(search)
    assert found is not None
    assert found.all()


def test_the_gates_gradient_is_that_of_the_equation() -> None:
    """dL / dz = g (1 - g) dL / dg, by differences of the loss on the gates' batch."""
    tuned = shake(pegbox.tune(family("llama"), "diffora", **FAST))
    search, data, (first, second) = search_on(tuned), Data(batches(2)), batches(2)
    losses = []
    for nudge in (0.02, -0.02):
        for path, graft in grafts(tuned).items():
            graft.gate = torch.tensor(0.5 + nudge if path == Q else 0.5)
        with torch.no_grad():
            losses.append(tuned(**second).loss.item())
    search.gate_step(data, first, second)
    assert search.logits.grad is not None
    at = list(search.grafts).index(Q)
    assert search.logits.grad[at].item() == pytest.approx(0.25 * (losses[0] - losses[1]) / 0.04, rel=0.02)


def test_at_b_zero_the_gates_have_no_gradient_so_factors_go_first() -> None:
    tuned = pegbox.tune(family("llama"), "diffora", **FAST)
    search, data, (first, second) = search_on(tuned), Data(batches(2)), batches(2)
    search.gate_step(data, first, second)
    assert search.logits.grad is not None
    assert not search.logits.grad.any()
    assert not search.logits.any()
    search.weight_step(data, first)
    search.gate_step(data, first, second)
    assert search.logits.grad.all()


@pytest.mark.parametrize(("relax", "total"), [("sigmoid", EACH / 2), ("softmax", 1.0)])
def test_gates_start_alike(relax: Any, total: float) -> None:
    search = search_on(pegbox.tune(family("llama"), "diffora", **FAST), relax=relax)
    gates = search.gates().view(LAYERS, EACH)
    torch.testing.assert_close(gates.sum(1), torch.full((LAYERS,), total))
    assert len(gates.unique()) == 1


def test_order_2_is_the_gradient_through_a_step_of_the_factors() -> None:
    """Against autograd through theta - xi dL_1 / dtheta, on one matrix and a square loss."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).double()
    tuned = shake(pegbox.tune(model, "diffora", targets=".*", rank=2, alpha=2.0), size=0.5)
    graft, w, xi = grafts(tuned)["0"], model[0].weight.detach(), 0.1
    first, second = ({"x": torch.randn(8, 6).double(), "y": torch.randn(8, 5).double()} for _ in range(2))
    data = Data([first, second], lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean())

    z = torch.zeros((), dtype=torch.double, requires_grad=True)
    a, b = (p.detach().double().requires_grad_() for p in (graft.a, graft.b))

    def loss(a: Tensor, b: Tensor, batch: Any) -> Tensor:
        y = batch["x"] @ (w + z.sigmoid() * (b @ a)).T
        return (y - batch["y"]).square().mean()

    to_a, to_b = torch.autograd.grad(loss(a, b, first), (a, b), create_graph=True)
    (want,) = torch.autograd.grad(loss(a - xi * to_a, b - xi * to_b, second), z)
    (plain,) = torch.autograd.grad(loss(a, b, second), z)

    found = []
    for order in (1, 2):
        search = GateSearch(tuned, "default", {"0": graft}, [""], order=order, weight_rate=xi, gate_rate=0.1)
        before = [p.detach().clone() for p in search.weights]
        search.gate_step(data, first, second)
        assert all(torch.equal(p, b) for p, b in zip(search.weights, before, strict=True))
        assert search.logits.grad is not None
        found.append(search.logits.grad.item())
    assert found[0] == pytest.approx(plain.item(), rel=1e-4)
    assert found[1] == pytest.approx(want.item(), rel=1e-2)
    assert abs(want - plain) > 0.05 * abs(plain)


@pytest.mark.parametrize("count", [2, 3, 6, 7, HELD + 10])
def test_no_batch_is_used_for_both(count: int) -> None:
    """However short the data, and however often they come again; what is kept is bounded."""
    found = list(itertools.islice(pairs({"k": k} for k in range(count)), 2 * count))
    first, second = ({pair[i]["k"] for pair in found} for i in (0, 1))
    assert not first & second
    assert len(first) == len(second) == count // 2
    again = [pair[0]["k"] for pair in found[count // 2 :]]
    assert max(again) < HELD
    assert again[:2] == [found[0][0]["k"], found[1 % min(count // 2, HELD // 2)][0]["k"]]


def test_data_that_are_shuffled_anew_are_gone_through_once() -> None:
    class Shuffled:
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter(batches(4))

    tuned, data = pegbox.tune(family("llama"), "diffora", **FAST), Shuffled()
    Callback(tuned, save=False).calibrate(data)
    assert data.times == 1


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_batches_are_refused(count: int) -> None:
    with pytest.raises(MethodError, match="takes two batches at least"):
        searched(count)


class Two(torch.nn.Module):
    """The first of its matrices does next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = (torch.nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0.0 * self.idle(x)


def test_it_finds_the_module_that_matters() -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(64, 6)
    tuned = pegbox.tune(model, "diffora", targets=".*", share="none", **FAST | {"search_steps": 30})
    data = [{"x": part, "y": part.roll(1, 1)} for part in x.chunk(2)]
    Callback(tuned, save=False).calibrate(data, lambda model, b: (model(b["x"]) - b["y"]).square().mean())
    method = method_of(tuned)
    assert method.chosen == ("used",)
    assert method.gates["used"] > 0.6
    assert method.gates["idle"] == 0.5


# -- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("relax", ["sigmoid", "softmax"])
def test_each_layer_gets_as_many(rho: float, relax: str) -> None:
    method = method_of(searched(rho=rho, relax=relax))
    assert method.chosen is not None
    for layer in range(LAYERS):
        paths = [path for path in method.gates if f"layers.{layer}." in path]
        mine = [path for path in method.chosen if path in paths]
        assert len(mine) == int(rho * EACH)
        least = min((method.gates[path] for path in mine), default=1.0)
        assert all(method.gates[path] <= least for path in paths if path not in mine)
    assert len(method.chosen) == LAYERS * int(rho * EACH)


def test_the_largest_of_all_layers() -> None:
    gates = {"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.2}
    assert largest(gates, [""] * 4, 0.5) == ("a", "b")
    assert largest(gates, list("0011"), 0.5) == ("a", "c")
    assert largest(dict.fromkeys(gates, 0.5), list("0011"), 0.5) == ("a", "c")
    assert len(largest({str(k): k / 100 for k in range(100)}, [""] * 100, 0.29)) == 29
    assert len(method_of(searched(topk="global", rho=0.25)).chosen or ()) == int(0.25 * LAYERS * EACH)


def test_rho_1_is_lora_everywhere() -> None:
    """With the very factors that LoRA starts with, under its keys."""
    tuned, lora = searched(rho=1.0), pegbox.tune(family("llama"), "lora", rank=2, alpha=6.0)
    require_same_bits(tuned.state(), lora.state(), "the adapter")
    for model in (tuned, lora):
        shake(model)
    assert torch.equal(tuned(**text(0)).logits, lora(**text(0)).logits)
    assert tuned.count() == lora.count()


def test_rho_0_is_one_adapter_for_each_type() -> None:
    tuned = searched(rho=0.0)
    assert method_of(tuned).chosen == ()
    roles = ["attn/q", "attn/k", "attn/v", "attn/out", "mlp/gate", "mlp/up", "mlp/down"]
    assert sorted(key.split("-")[0] for key in pairs_in(tuned).pairs) == sorted(roles)
    assert all(key.startswith("shared.") for key in tuned.state())
    one = sum(2 * sum(site.shape) for path, site in tuned.sites.items() if "layers.0." in path)
    assert tuned.count()[0] == one


def test_by_layer_what_has_one_shape_shares() -> None:
    tuned = pegbox.tune(family("llama"), "diffora", share="layer", chosen=(), **FAST)
    found = grafts(tuned)
    assert found[Q].pair is found[Q.replace("q_proj", "o_proj")].pair
    assert found[Q].pair is not found[Q.replace("layers.0", "layers.1")].pair
    assert len(pairs_in(tuned).pairs) == LAYERS * 4  # (32, 32), (16, 32), (48, 32), (32, 48)


def test_without_sharing_the_others_have_no_update() -> None:
    tuned = searched(share="none")
    assert tuple(tuned.sites) == method_of(tuned).chosen
    assert tuned.adapter().shared is None
    with pytest.raises(SettingsError, match=r"rho=0\.1 chooses none of 14 modules"):
        searched(share="none", rho=0.1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_the_file_without_sharing_is_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    tuned = shake(searched(share="none"))
    tuned.save(tmp_path)
    theirs: Any = PeftModel.from_pretrained(family("llama"), tmp_path).eval()
    assert torch.allclose(theirs(**text(0)).logits, tuned(**text(0)).logits, atol=2e-5)


def test_types_are_told_apart_without_roles() -> None:
    torch.manual_seed(0)
    blocks = [torch.nn.ModuleDict({"fc1": torch.nn.Linear(6, 6), "fc2": torch.nn.Linear(6, 6)}) for _ in range(3)]
    tuned = pegbox.tune(torch.nn.ModuleList(blocks), "diffora", targets=".*fc.", chosen=(), rank=2)
    found = grafts(tuned)
    assert found["0.fc1"].pair is found["2.fc1"].pair
    assert found["0.fc1"].pair is not found["0.fc2"].pair


def test_other_ranks_share_apart() -> None:
    tuned = pegbox.tune(family("llama"), "diffora", chosen=(), **{**FAST, "ranks": {Q: 3, V: 0}})
    found = grafts(tuned)
    assert V not in found
    assert found[Q].pair is not found[Q.replace("layers.0", "layers.1")].pair
    assert found[Q].pair.a.shape[0] == 3


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        (
            {"chosen": ("model.layers.0.self_attn.p_proj",)},
            SettingsError,
            "which its targets do not; did you mean",
        ),
        ({"rho": 1.5}, SettingsError, "at most 1"),
        ({"order": 3}, SettingsError, "at most 2"),
        ({"share": "all"}, SettingsError, "'layer'"),
    ],
)
def test_mistakes(settings: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pegbox.tune(family("llama"), "diffora", **settings)


# -- shared factors ------------------------------------------------------------------------------------------------


def shared_qs() -> Tuned:
    """Two query projections that share a pair, and factors of their own at one value projection."""
    tuned = pegbox.tune(family("llama"), "diffora", targets="attn.q,attn.v", chosen=(V,), share="type", **FAST)
    return shake(tuned, size=0.3).eval()


def test_a_shared_pair_is_one_tensor_counted_and_saved_once(tmp_path: Path) -> None:
    tuned = shared_qs()
    first, second = (grafts(tuned)[f"model.layers.{k}.self_attn.q_proj"] for k in range(2))
    assert isinstance(first, SharedGraft)
    assert first.pair.a.data_ptr() == second.pair.a.data_ptr()
    q, v = (sum(tuned.sites[path].shape) for path in (Q, V))
    assert tuned.count()[0] == 2 * (q + v + v)  # q's pair, v's pair of layer 0, v's own of layer 1
    assert sum(p.numel() for g in tuned.groups(0.1) for p in g["params"]) == tuned.count()[0]
    tuned.save(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in kept.values()) == tuned.count()[0]
    assert sum("attn/q" in key for key in kept) == 2


def test_gradients_add_up_over_all_users() -> None:
    """To the sum of those of two LoRAs with equal factors."""
    tuned = shared_qs()
    paths = [f"model.layers.{k}.self_attn.q_proj" for k in range(2)]
    lora = pegbox.tune(family("llama"), "lora", rank=2, alpha=6.0, targets="attn.q,attn.v").eval()
    for path, graft in grafts(lora).items():
        down, up, _ = grafts(tuned)[path].factors()
        graft.begin(down.detach(), up.detach())
    assert torch.allclose(tuned(**text(0)).logits, lora(**text(0)).logits, atol=1e-6)
    for model in (tuned, lora):
        model(**batches(1)[0]).loss.backward()
    pair, each = grafts(tuned)[Q].pair, [grafts(lora)[path] for path in paths]
    for leaf in ("a", "b"):
        want = sum(getattr(graft, leaf).grad for graft in each)
        torch.testing.assert_close(getattr(pair, leaf).grad, want, rtol=1e-4, atol=1e-6)


def test_merged_is_unmerged() -> None:
    tuned = shared_qs()
    want = tuned(**text(0)).logits
    merged = tuned.merge()
    assert torch.allclose(merged(**text(0)).logits, want, atol=1e-5)
    assert torch.equal(tuned.unmerge()(**text(0)).logits, want)


def test_lora_plus_reaches_shared_factors() -> None:
    tuned = pegbox.tune(family("llama"), "diffora", chosen=(), b_rate=16.0, **FAST)
    rates = {name.rpartition(".")[2]: g["lr"] for g in tuned.groups(0.1) for name in g["names"]}
    assert rates == {"a": pytest.approx(0.1), "b": pytest.approx(1.6)}


# -- what is kept --------------------------------------------------------------------------------------------------


def test_factors_start_again_or_go_on() -> None:
    """Where the tuned model's own seed has put them, or where the search has."""
    start = pegbox.tune(family("llama"), "diffora", seed=7, **FAST).state()
    for reinit in (True, False):
        tuned = pegbox.tune(family("llama"), "diffora", seed=7, reinit=reinit, **FAST)
        Callback(tuned, save=False).calibrate(batches())
        own = {key: value for key, value in tuned.state().items() if key.startswith("graft.")}
        assert len(own) == 2 * len(method_of(tuned).chosen or ())
        assert all(torch.equal(value, start[key]) == reinit for key, value in own.items())
        assert not any(pair.b.any() for pair in pairs_in(tuned).pairs.values())  # type: ignore[operator]


@pytest.mark.parametrize("start", ["pissa", "eva", "lora_ga"])
def test_starts(start: str) -> None:
    """Own factors have it; shared ones start as LoRA's."""
    tuned = searched(start=start)
    assert torch.allclose(tuned(**text(0)).logits, family("llama")(**text(0)).logits, atol=1e-5)
    lora = pegbox.tune(family("llama"), "lora", rank=2, alpha=6.0, start=start)
    if start != "pissa":
        Callback(lora, save=False).calibrate(batches())
    else:
        for path in method_of(tuned).chosen or ():
            assert torch.equal(grafts(tuned)[path].a, grafts(lora)[path].a)
    assert method_of(tuned).gates
    assert any(isinstance(graft, SharedGraft) for graft in grafts(tuned).values())
    if start != "pissa":
        with pytest.raises(SettingsError, match="reinit must be true"):
            searched(start=start, reinit=False)


@pytest.mark.parametrize("reinit", [True, False])
def test_a_module_trained_whole_learns_in_the_search_and_starts_again(reinit: bool) -> None:
    model = family("llama")
    tuned = pegbox.tune(model, "diffora", also_train=["lm_head"], reinit=reinit, **FAST)
    Callback(tuned, save=False).calibrate(batches())
    assert torch.equal(tuned.state()["copy.lm_head.weight"], model.lm_head.weight) == reinit


@pytest.mark.parametrize("settings", [{}, {"rho": 0.0}, {"share": "layer"}, {"share": "none"}, {"start": "pissa"}])
def test_what_was_found_is_saved_and_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    tuned = shake(searched(**settings))
    tuned.save(tmp_path)
    again = pegbox.load(family("llama"), tmp_path)
    assert again.method == tuned.method
    require_same_bits(again.state(), tuned.state(), "the adapter")
    assert torch.equal(again(**text(0)).logits, tuned(**text(0)).logits)
    assert not Callback(again, save=False).needs_data


def test_other_adapters_in_use_are_left_alone() -> None:
    tuned = shake(pegbox.tune(family("llama"), "lora", rank=2))
    before = {key: value.clone() for key, value in tuned.state("default").items()}
    tuned.add("second", DiffoRA(**FAST)).use(["default", "second"])
    Callback(tuned, save=False).calibrate(batches())
    require_same_bits(tuned.state("default"), before, "the first adapter")
    assert tuned.active == ("default", "second")
    assert tuned.adapter("second").method.chosen  # type: ignore[attr-defined]


def trainer(folder: Path) -> Trainer:
    tuned = pegbox.tune(family("llama"), "diffora", **FAST, dropout=0.1)
    counts = [[(i + j) % 50 + 1 for j in range(8)] for i in range(24)]
    rows = [Encoded(ids, ids, str(i)) for i, ids in enumerate(counts)]
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(tuned, "causal_lm", args, train_dataset=rows, data_collator=PadCollator(0))


def test_a_resumed_run_keeps_the_selection(tmp_path: Path) -> None:
    """And ends with the bits of the run that was not interrupted, dropout and all."""
    whole, again = trainer(tmp_path), trainer(tmp_path)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    chosen = method_of(whole.tuned).chosen
    assert chosen
    assert len(chosen) == LAYERS * (EACH // 2)
    assert method_of(again.tuned) == method_of(whole.tuned)
    require_same_bits(again.tuned.state(), whole.tuned.state(), "the adapter")
    loaded = pegbox.load(family("llama"), tmp_path / "checkpoint-4")
    assert loaded.method == whole.tuned.method
    require_same_bits(loaded.state(), whole.tuned.state(), "the file")
