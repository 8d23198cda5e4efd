"""Starts that look at data: what they find, and that the base stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import bits, require_same_bits
from pegbox.checks.models import FAMILIES, text
from pegbox.core import starts
from pegbox.core.calibration import Data
from pegbox.core.errors import MethodError, SettingsError
from pegbox.core.low_rank_start import started
from pegbox.core.observe import gradients, tokens
from pegbox.core.starts.eva import Directions, allotted
from pegbox.data.collate import PackedCollator
from pegbox.data.packing import Packed
from pegbox.train import Callback


def llama() -> Any:
    torch.manual_seed(0)
    return FAMILIES["llama"].build().eval()


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [{**text(k), "labels": text(k)["input_ids"]} for k in range(count)]


def looked(method: str, **settings: Any) -> pegbox.core.Tuned:
    tuned = pegbox.tune(llama(), method, rank=2, **settings)
    Callback(tuned).calibrate(batches())
    return tuned


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(SettingsError, match="'pisa'; did you mean 'pissa'"):
        pegbox.tune(llama(), "lora", start="pisa")
    with pytest.raises(SettingsError, match="start eva has no setting 'roh'"):
        pegbox.tune(llama(), "lora", start="eva", start_settings={"roh": 1})
    assert {"default", "gaussian", "pissa", "olora", "eva", "lora_ga"} <= set(starts.names())


@pytest.mark.parametrize("method", ["lora", "dora", "eva", "lora_ga"])
@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_what_was_looked_at_stays_the_base(method: str, start: str) -> None:
    model = llama()
    before, want = bits(model), model(**text(0)).logits
    tuned = pegbox.tune(model, method, rank=2, start=start)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    Callback(tuned).calibrate(batches())
    torch.testing.assert_close(tuned(**text(0)).logits, want, rtol=1e-5, atol=1e-5)
    require_same_bits(bits(model), before, "the base")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(p.grad is None for p in tuned.parameters())
    assert tuned.active == ("default",)
    assert not any(m._forward_hooks for m in model.modules())


# -- EVA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_keep_the_budget_and_the_scale(rho: float) -> None:
    tuned = looked("eva", alpha=6.0, start_settings={"rho": rho, "batches": 4})
    method: Any = tuned.method
    grafts = started(tuned, "default")
    ranks = {path: len(graft.a) for path, graft in grafts.items()}
    paths = len(pegbox.tune(llama(), "lora", rank=2).sites)
    assert sum(ranks.values()) == 2 * paths
    assert max(ranks.values()) <= 2 * rho
    if rho == 1:
        assert set(ranks.values()) == {2}
        assert method.ranks == {}
    else:
        assert len(set(method.ranks.values())) > 1
        assert [path for path, rank in method.ranks.items() if rank == 0] == sorted(
            set(method.ranks) - set(grafts), key=list(method.ranks).index
        )
    for path, graft in grafts.items():
        assert method.factor_at(path) == pytest.approx(3.0)
        torch.testing.assert_close(graft.a @ graft.a.T, torch.eye(len(graft.a)), rtol=1e-4, atol=1e-4)
        assert not graft.b.any()


def test_layers_with_equal_inputs_have_equal_directions() -> None:
    tuned = looked("eva", start_settings={"rho": 1.0})
    grafts = started(tuned, "default")
    first = next(path for path in grafts if path.endswith("q_proj"))
    assert grafts[first].a.equal(grafts[first.replace("q_proj", "k_proj")].a)


def test_padding_does_not_count() -> None:
    padded = [
        {
            "input_ids": torch.cat([b["input_ids"], torch.full((len(b["input_ids"]), 3), 5)], 1),
            "attention_mask": torch.cat(
                [torch.ones_like(b["input_ids"]), torch.zeros(len(b["input_ids"]), 3)], 1
            ).long(),
        }
        for b in batches()
    ]
    found = []
    for rows in (batches(), padded):
        tuned = pegbox.tune(llama(), "eva", rank=2, start_settings={"rho": 1.0, "batches": 4})
        Callback(tuned).calibrate(rows)
        found.append({path: graft.a for path, graft in started(tuned, "default").items()})
    for path, a in found[0].items():
        assert (a @ found[1][path].T).square().sum().item() == pytest.approx(2, abs=1e-2), path


def test_padding_of_packed_rows_does_not_count() -> None:
    rows = [
        Packed([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9], [0, 1, 0, 1, 2], ("a", "b")),
        Packed([3, 4], [-100, 4], [0, 1], ("c",)),
    ]
    batch = PackedCollator(0)(rows)
    assert tokens(batch).tolist() == [[True] * 5, [True] * 2 + [False] * 3]  # type: ignore[union-attr]
    assert tokens(batch, labelled=True).tolist()[1] == [False, True, False, False, False]  # type: ignore[union-attr]


def test_a_known_subspace_is_found_whatever_the_parts() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 3))[0].T
    rows = torch.randn(400, 3) * torch.tensor([3.0, 2.0, 1.0]) @ basis + 5
    one, many = Directions(3, 30, torch.device("cpu")), Directions(3, 30, torch.device("cpu"))
    one.add(rows)
    for part in rows.chunk(8):
        many.add(part)
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    for found in (one, many):
        torch.testing.assert_close((found.vectors * vectors[:3]).sum(1).abs(), torch.ones(3), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.shares, values[:3].square() / centred.square().sum(), rtol=1e-3, atol=1e-3)
    assert (many.turned > 0.9).all()


def test_ties_go_to_earlier_layers_and_the_budget_is_exact() -> None:
    same = torch.tensor([0.5, 0.2])
    assert allotted({"a": same, "b": same, "c": torch.tensor([0.4, 0.3])}, 4) == {"a": 1, "b": 1, "c": 2}
    assert allotted({"a": same, "b": same}, 3) == {"a": 2, "b": 1}


def test_found_ranks_are_saved_and_loaded(tmp_path: Path) -> None:
    tuned = looked("eva")
    for graft in started(tuned, "default").values():
        nn.init.normal_(graft.b)
    want = tuned.eval()(**text(0)).logits
    tuned.save(tmp_path)
    again = pegbox.load(llama(), tmp_path)
    torch.testing.assert_close(again(**text(0)).logits, want)
    assert again.method == tuned.method


# -- LoRA-GA -------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_weights() -> None:
    model = llama()
    tuned = pegbox.tune(model, "lora", rank=2)
    paths = list(tuned.sites)
    found = dict(gradients(tuned, Data(iter(batches())), paths, most=4, bytes_at_once=10_000))
    tuned.detach()
    model.train()
    for batch in batches():
        model(**batch).loss.backward()
    for path in paths:
        want: Any = model.get_submodule(path).weight.grad / 4  # type: ignore[operator, union-attr]
        torch.testing.assert_close(found[path], want, rtol=1e-4, atol=1e-6, msg=path)


def one_matrix() -> tuple[pegbox.core.Tuned, Tensor, list[dict[str, Tensor]]]:
    """A linear model, and batches whose gradient at its weight has rank 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16, bias=False))
    return pegbox.tune(model, "lora_ga", rank=2, alpha=3.0, targets=".*"), model[0].weight.detach().clone(), []


def loss_of(gradient: Tensor) -> Any:
    return lambda model, batch: (model(torch.eye(20)).T * gradient).sum()


def test_the_factors_are_the_gradients_first_singular_vectors() -> None:
    tuned, _, _ = one_matrix()
    gradient = torch.randn(16, 4) @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ torch.randn(4, 20)
    Callback(tuned).calibrate([{}], loss_of(gradient))
    graft = started(tuned, "default")["0"]
    c = 16**0.25 / 16**0.5
    torch.testing.assert_close(graft.a @ graft.a.T, c**2 * torch.eye(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(graft.b.T @ graft.b, c**2 * torch.eye(2), rtol=1e-3, atol=1e-3)
    u, _, vt = torch.linalg.svd(gradient)
    torch.testing.assert_close((graft.a / c @ vt[:2].T).square().sum(), torch.tensor(2.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((graft.b.T / c @ u[:, 2:4]).square().sum(), torch.tensor(2.0), rtol=1e-3, atol=1e-3)


def test_the_first_step_goes_where_full_tuning_would() -> None:
    """As nearly as the gradient's rank allows: exactly, where it is 2 r; and nearer than LoRA's."""
    cosines = {}
    gradient = torch.linalg.qr(torch.randn(16, 4))[0] @ torch.linalg.qr(torch.randn(20, 4))[0].T
    for start in ("lora_ga", "default"):
        tuned, w, _ = one_matrix()
        if start == "default":
            tuned.detach()
            tuned = pegbox.tune(tuned.model, "lora", rank=2, alpha=3.0, targets=".*")
        loss = loss_of(gradient)
        if start == "lora_ga":
            Callback(tuned).calibrate([{}], loss)
        optimizer = torch.optim.SGD(tuned.groups(1e-4))
        loss(tuned, {}).backward()
        optimizer.step()
        graft: Any = started(tuned, "default")["0"]
        moved = graft.weight(w) - w
        cosines[start] = -torch.nn.functional.cosine_similarity(moved.flatten(), gradient.flatten(), 0).item()
    assert cosines["lora_ga"] == pytest.approx(1, abs=1e-3)
    assert cosines["lora_ga"] > cosines["default"]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weight"])
def test_every_direction_and_scale(direction: str, scale: str) -> None:
    tuned = looked("lora_ga", start_settings={"direction": direction, "scale": scale, "batches": 2})
    for graft in started(tuned, "default").values():
        assert graft.b.any()
        assert graft.a0 is not None
        assert graft.a0.equal(graft.a)


def test_a_rank_whose_double_is_too_large_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"rank must be 1\.\.8 at .*k_proj .*got 9"):
        pegbox.tune(llama(), "lora_ga", rank=9)


def test_a_model_without_a_loss_is_told_what_to_give() -> None:
    tuned, _, _ = one_matrix()
    with pytest.raises(MethodError, match="calibrate\\(batches, loss="):
        Callback(tuned).calibrate([{"input": torch.eye(20)}])


def test_an_iterator_can_be_gone_through_again() -> None:
    data = Data(iter([{"x": 1}, {"x": 2}]))
    assert [batch["x"] for batch in data.cycle(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(MethodError, match="no batch"):
        list(Data([]).cycle(1))
