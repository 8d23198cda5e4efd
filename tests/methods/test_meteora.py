"""MeteoRA: experts as their adapters have them, gates that choose, and what they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pegbox
from pegbox.checks.lab import shake
from pegbox.core.errors import AdapterError, MethodError, SettingsError
from pegbox.core.tuned import Tuned
from pegbox.methods.meteora import MeteoRAGraft

from .tiny import family


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three adapters of other methods, ranks and targets."""
    made = {
        "first": ("lora", {"rank": 2, "alpha": 3.0, "targets": "q_proj"}),
        "second": ("lora", {"rank": 3, "start": "pissa", "targets": ("q_proj", "v_proj")}),
        "third": ("miss", {"rank": 4, "targets": "q_proj"}),
    }
    for seed, (name, (method, settings)) in enumerate(made.items()):
        tuned = pegbox.tune(family("llama"), method, **settings)  # type: ignore[arg-type]
        shake(tuned, seed + 1, 0.3)
        tuned.save(tmp_path / name)
    return [str(tmp_path / name) for name in made]


def grafts(tuned: Tuned) -> dict[str, MeteoRAGraft]:
    return {path: site.grafts["default"] for path, site in tuned.sites.items()}  # type: ignore[misc]


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(seed))


def out(model: Any, **more: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids(), **more).logits
    return logits.detach()


def test_a_gate_that_is_sure_gives_the_adapter_alone(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders), top_k=1).eval()
    for k, folder in enumerate(folders):
        want = out(pegbox.load(family("llama"), folder))
        for graft in grafts(tuned).values():
            graft.logits = lambda x, k=k: F.one_hot(torch.full(x.shape[:-1], k), 3).float()  # type: ignore[method-assign]
        assert torch.allclose(out(tuned), want, atol=1e-5)


def test_gates_alike_give_the_mean(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders), top_k=3).eval()
    mean = pegbox.load(family("llama"), folders[0], name="a")
    for name, folder in zip("bc", folders[1:], strict=True):
        pegbox.load(mean, folder, name=name)
    mean.use(pegbox.Sum(a=1 / 3, b=1 / 3, c=1 / 3))
    for graft in grafts(tuned).values():
        torch.nn.init.zeros_(graft.gate)
    assert torch.allclose(out(tuned), out(mean), atol=1e-5)


def test_it_says_what_it_is_made_from(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders))
    method: Any = tuned.method
    assert method.names == ("first", "second", "third")
    assert method.ranks == (2, 6, 4)  # PiSSA's update has twice its rank
    assert {path.rpartition(".")[2] for path in tuned.sites} == {"q_proj", "v_proj"}


def test_gates_alone_train(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders), top_k=2)
    assert {key.rpartition(".")[2] for key in tuned.trainable()} == {"gate"}
    before = {path: (graft.a.clone(), graft.b.clone()) for path, graft in grafts(tuned).items()}
    optimizer = torch.optim.Adam(tuned.groups(1e-2))
    for _ in range(3):
        batch = ids()
        (tuned(input_ids=batch, labels=batch).loss + tuned.penalty()).backward()
        optimizer.step()
    assert all(torch.equal(graft.a, before[path][0]) for path, graft in grafts(tuned).items())
    assert all(torch.equal(graft.b, before[path][1]) for path, graft in grafts(tuned).items())


def test_a_saved_one_needs_no_folders(folders: list[str], tmp_path: Path) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders)).eval()
    tuned.save(tmp_path / "all")
    for folder in folders:
        Path(folder).rename(f"{folder}-moved")
    again = pegbox.load(family("llama"), tmp_path / "all")
    assert torch.equal(out(again), out(tuned))
    assert again.method.names == ("first", "second", "third")  # type: ignore[attr-defined]


def test_the_gates_loss_is_the_cross_entropy_with_the_tasks(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders), gate_loss=2.0)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    tasks = torch.tensor([2, 0])
    tuned(input_ids=ids(), attention_mask=mask, task_ids=tasks)
    routes = list(tuned.context.routes.values())
    by_hand = torch.stack(
        [
            torch.stack(
                [-route.logits[b, t].log_softmax(-1)[tasks[b]] for b in (0, 1) for t in range(6) if mask[b, t]]
            ).mean()
            for route in routes
        ]
    ).mean()
    assert float(tuned.extra_losses()["penalty"].detach()) == pytest.approx(2 * by_hand.item(), rel=1e-5)
    tuned(input_ids=ids())
    assert tuned.penalty() == 0


def test_gates_learn_the_tasks(folders: list[str]) -> None:
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders))
    batch, tasks = ids(), torch.tensor([2, 0])
    optimizer = torch.optim.Adam(tuned.groups(5e-2))
    for _ in range(150):
        optimizer.zero_grad()
        tuned(input_ids=batch, task_ids=tasks)
        tuned.penalty().backward()  # type: ignore[union-attr]
        optimizer.step()
    tuned(input_ids=batch)
    found = [route.logits.argmax(-1) for route in tuned.context.routes.values()]
    right = [(experts == tasks[:, None]).float().mean().item() for experts in found]
    assert min(right) > 0.9


def test_more_adapters_keep_the_gates_of_those_that_stay(folders: list[str], tmp_path: Path) -> None:
    two = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders[:2]))
    shake(two, 5, 0.3)
    two.save(tmp_path / "two")
    three = pegbox.tune(family("llama"), "meteora", adapters=(folders[2], folders[0], folders[1]))
    pegbox.load(three, tmp_path / "two", name="before")
    three.inherit("default", "before")
    for path, graft in grafts(three).items():
        assert torch.equal(graft.gate[1:], two.sites[path].grafts["default"].gate)  # type: ignore[arg-type]


def test_what_cannot_be_an_expert_is_refused(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name their folders"):
        pegbox.tune(family("llama"), "meteora")
    with pytest.raises(SettingsError, match=r"meteora.names must name 2 adapters, each once, got same, same"):
        pegbox.tune(family("llama"), "meteora", adapters=tuple(folders[:2]), names=("same", "same"))
    with pytest.raises(SettingsError, match=r"second changes .*v_proj, which is not among meteora.targets"):
        pegbox.tune(family("llama"), "meteora", adapters=tuple(folders), targets="q_proj")
    pegbox.tune(family("llama"), "ia3").save(tmp_path / "other")
    with pytest.raises(AdapterError, match="which is no product of two thin matrices"):
        pegbox.tune(family("llama"), "meteora", adapters=(str(tmp_path / "other"),))
    tuned = pegbox.tune(family("llama"), "meteora", adapters=tuple(folders))
    with pytest.raises(MethodError, match=r"0\.\.2, of experts, got 3"):
        tuned(input_ids=ids(), task_ids=torch.tensor([0, 3]))
