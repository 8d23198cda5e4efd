"""AdamW in subspaces of the gradient: plain AdamW where there is none, what is held, and rows of a given length."""

from __future__ import annotations

import copy
import io
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pegbox.core.errors import MissingExtra, SettingsError
from pegbox.updates.projected import ProjectedAdamW, apart

SIDES = {  # projection: what is kept at (12, 8), what at (8, 12)
    "std": ({"right"}, {"left"}),
    "reverse_std": ({"left"}, {"right"}),
    "left": ({"left"}, {"left"}),
    "right": ({"right"}, {"right"}),
    "full": ({"left", "right"}, {"left", "right"}),
}


def matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def gradients(shape: tuple[int, ...], steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


def numbers(state: dict[str, Any]) -> int:
    return sum(v.numel() for k, v in state.items() if k != "step")


@pytest.mark.parametrize("projection", SIDES)
@pytest.mark.parametrize(("shape", "rank"), [((12, 8), 8), ((8, 12), 30), ((9,), 2), ((), 2), ((12, 8), None)])
def test_without_a_subspace_it_is_adamw(shape: tuple[int, ...], rank: int | None, projection: Any) -> None:
    ours, theirs = matrix(*shape), matrix(*shape)
    grads = gradients(shape, 20)
    given = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    run(ProjectedAdamW([ours], rank=rank, gap=3, projection=projection, **given), ours, grads)  # type: ignore[arg-type]
    run(torch.optim.AdamW([theirs], **given), theirs, grads)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (12, 2, 2, 2)])
@pytest.mark.parametrize("projection", SIDES)
def test_the_equation(shape: tuple[int, ...], projection: Any) -> None:
    """Written out in the space of `low`, with torch's own Adam there."""
    p = matrix(*shape)
    grads = gradients(shape, 6)
    want = p.detach().clone().flatten(1)
    optimizer = ProjectedAdamW([p], lr=0.1, weight_decay=0.2, rank=3, gap=6, scale=0.5, projection=projection)
    run(optimizer, p, grads)
    state = optimizer.state[p]
    left, right = (state.get(side) for side in ("left", "right"))
    x = left if left is not None else torch.eye(want.shape[0])
    y = right if right is not None else torch.eye(want.shape[1])
    low = nn.Parameter(torch.zeros(len(x), len(y)))
    adam = torch.optim.Adam([low], lr=0.05)
    for grad in grads:
        before = low.detach().clone()
        run(adam, low, [x @ grad.flatten(1) @ y.T])
        want = (1 - 0.1 * 0.2) * want + x.T @ (low.detach() - before) @ y
    assert torch.allclose(p.flatten(1), want, atol=1e-5)


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("projection", SIDES)
def test_projectors_are_the_first_singular_vectors(projection: Any, tall: bool) -> None:
    shape = (12, 8) if tall else (8, 12)
    p, (grad,) = matrix(*shape), gradients(shape, 1)
    optimizer = ProjectedAdamW([p], rank=3, projection=projection)
    run(optimizer, p, [grad])
    held = {k: v for k, v in optimizer.state[p].items() if k in ("left", "right")}
    assert held.keys() == SIDES[projection][0 if tall else 1]
    u, s, vh = torch.linalg.svd(grad)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    for side, rows in held.items():
        assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-5)
        assert torch.allclose(rows.T @ (rows @ grad) if side == "left" else grad @ rows.T @ rows, best, atol=1e-4)
        assert rows.untyped_storage().nbytes() == rows.nbytes, "the other singular vectors are kept"


@pytest.mark.parametrize("gap", [1, 4])
def test_a_new_subspace_every_gap_steps(gap: int) -> None:
    p = matrix(12, 8)
    optimizer, last, changed = ProjectedAdamW([p], rank=3, gap=gap), None, []
    for k, grad in enumerate(gradients((12, 8), 10)):
        run(optimizer, p, [grad])
        now = optimizer.state[p]["right"]
        if last is None or not torch.equal(now, last):
            changed.append(k)
        last = now.clone()
    assert changed == list(range(0, 10, gap))


@pytest.mark.parametrize(("shape", "p", "q"), [((40, 24), 40, 24), ((24, 40), 40, 24)])
def test_what_is_held(shape: tuple[int, int], p: int, q: int) -> None:
    """r q for the projector and 2 p r for the moments, p the longer side; on both sides p r + r q + 2 r^2."""
    r, sizes = 4, {}
    for name, more in {"one": {}, "both": {"projection": "full"}, "rows": {"normalised": True}}.items():
        weight = matrix(*shape)
        optimizer = ProjectedAdamW([weight], rank=r, **more)  # type: ignore[arg-type]
        run(optimizer, weight, gradients(shape, 2))
        sizes[name] = numbers(optimizer.state[weight])
    assert sizes == {
        "one": r * q + 2 * p * r,
        "both": p * r + r * q + 2 * r * r,
        "rows": r * q + 2 * p * r + 3 * shape[0],
    }
    assert max(sizes.values()) < 2 * p * q


def test_groups_have_their_own_settings() -> None:
    a, b = matrix(12, 8), matrix(12, 8)
    optimizer = ProjectedAdamW([{"params": [a]}, {"params": [b], "rank": None, "lr": 0.5}], lr=1e-3, rank=2)
    for p in (a, b):
        p.grad = gradients((12, 8), 1)[0]
    optimizer.step()
    assert "right" in optimizer.state[a]
    assert "right" not in optimizer.state[b]
    assert (b - matrix(12, 8)).abs().max().item() == pytest.approx(0.5, abs=1e-3)


def test_what_has_no_gradient_stays() -> None:
    p = matrix(12, 8)
    optimizer = ProjectedAdamW([p], rank=2, weight_decay=1.0)
    optimizer.step()
    assert torch.equal(p, matrix(12, 8))
    assert not optimizer.state


@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_are_projected_after_accumulation(normalised: bool) -> None:
    """Two backward passes and one of their sum give the same step."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    ends = []
    for parts in ([x[0], x[1]], [x.flatten(0, 1)]):
        p = matrix(12, 8)
        optimizer = ProjectedAdamW([p], lr=0.1, rank=2, normalised=normalised)
        for part in parts:
            (part @ p.T).tanh().sum().backward()
        optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-5)


def test_rows_have_the_length_g() -> None:
    p = matrix(12, 8)
    optimizer = ProjectedAdamW([p], lr=0.05, weight_decay=0.1, rank=3, gap=4, normalised=True)
    lengths = [p.norm(dim=1).detach()]
    for grad in gradients((12, 8), 15):
        run(optimizer, p, [grad])
        g = optimizer.state[p]["g"]
        assert torch.allclose(p.norm(dim=1), g, atol=1e-6)
        lengths.append(g.clone())
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(lengths)), "g does not train"


def test_lengths_follow_adam_of_their_own_gradient() -> None:
    """g against torch's Adam on an independent vector, W = g V / |V| differentiated by autograd."""
    p, target = matrix(12, 8), matrix(12, 8, seed=5).detach()
    g = nn.Parameter(p.norm(dim=1).detach())
    ours, adam = ProjectedAdamW([p], lr=0.02, rank=3, normalised=True), torch.optim.AdamW([g], lr=0.02, weight_decay=0)
    for _ in range(10):
        v = p.detach().clone()
        ((g / v.norm(dim=1))[:, None] * v - target).square().sum().backward()
        adam.step()
        adam.zero_grad()
        (p - target).square().sum().backward()
        ours.step()
        ours.zero_grad()
        assert torch.allclose(ours.state[p]["g"], g, atol=1e-5)


def test_directions_leave_lengths_alone() -> None:
    """Where no gradient lies along the rows, g has none, and rows turn without growing.

    The rows are axes, so that what lies across them does to the last bit, for one step.
    """
    p = nn.Parameter(torch.diag(torch.arange(1.0, 9.0)))
    optimizer = ProjectedAdamW([p], lr=0.05, rank=3, normalised=True)
    (grad,) = gradients((8, 8), 1)
    run(optimizer, p, [grad.fill_diagonal_(0.0)])
    assert p.detach().triu(1).norm() > 0.05
    assert torch.equal(optimizer.state[p]["g"], torch.arange(1.0, 9.0))
    assert torch.allclose(p.norm(dim=1), torch.arange(1.0, 9.0), rtol=1e-6)


def test_gradients_of_lengths_and_directions_are_autograds() -> None:
    w, grad = matrix(12, 8).detach(), gradients((12, 8), 1)[0]
    g, v = nn.Parameter(w.norm(dim=1)), nn.Parameter(w.clone())
    ((g / v.norm(dim=1))[:, None] * v).backward(grad)
    dv, dg = apart(w, grad)
    assert torch.allclose(dv, v.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(dg, g.grad, atol=1e-5)  # type: ignore[arg-type]
    assert (dv * w).sum(1).abs().max() < 1e-5


def test_rows_of_zeros_start_and_none_turns_into_nan() -> None:
    p = nn.Parameter(torch.zeros(12, 8))
    optimizer = ProjectedAdamW([p], lr=0.1, rank=3, gap=5, normalised=True)
    target = matrix(12, 8).detach()
    for _ in range(200):
        p.grad = p.detach() - target
        optimizer.step()
    assert torch.isfinite(p).all()
    assert (optimizer.state[p]["g"] >= 0).all()
    assert (p - target).norm() < 0.5 * target.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"normalised": True}, {"bits": 8}, {"projection": "full"}])
def test_resumes_to_the_same_bits(more: dict[str, Any], dtype: torch.dtype) -> None:
    """Through a file; steps 5 to 9 lie within a gap of 4 and across one."""
    if "bits" in more:
        pytest.importorskip("bitsandbytes")
    grads = [g.to(dtype) for g in gradients((12, 8), 10)]
    given = {"lr": 0.05, "weight_decay": 0.1, "rank": 3, "gap": 4} | more
    whole, part = (nn.Parameter(matrix(12, 8).detach().to(dtype)) for _ in range(2))
    one = ProjectedAdamW([whole], **given)
    run(one, whole, grads)
    first = ProjectedAdamW([part], **given)
    run(first, part, grads[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(part.detach().clone())
    second = ProjectedAdamW([resumed], **given)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, grads[5:])
    assert torch.equal(resumed, whole)
    assert second.state[resumed].keys() == one.state[whole].keys()
    for key, value in one.state[whole].items():
        assert second.state[resumed][key].dtype == value.dtype
        assert torch.equal(second.state[resumed][key], value), key


def test_a_loaded_state_is_a_copy() -> None:
    p = matrix(12, 8)
    first, second = (ProjectedAdamW([p], rank=3) for _ in range(2))
    run(first, p, gradients((12, 8), 2))
    saved = first.state_dict()
    before = copy.deepcopy(saved["state"][0])
    second.load_state_dict(saved)
    run(second, p, gradients((12, 8), 3))
    assert all(torch.equal(value, before[key]) for key, value in saved["state"][0].items())


def test_eight_bits_are_near_and_a_quarter() -> None:
    """In one subspace: of a random gradient the next one is chosen by small differences."""
    pytest.importorskip("bitsandbytes")
    shape, ends, held = (96, 64), [], []
    target = matrix(*shape, seed=7).detach()
    for bits in (32, 8):
        p = matrix(*shape)
        optimizer = ProjectedAdamW([p], lr=0.02, rank=16, gap=100, bits=bits)  # type: ignore[arg-type]
        for _ in range(60):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append(p.detach())
        held.append(sum(v.nbytes for k, v in optimizer.state[p].items() if k.startswith("exp_avg")))
    moved = (ends[0] - matrix(*shape)).norm()
    assert (ends[1] - ends[0]).norm() < 0.05 * moved
    assert held[1] / held[0] == pytest.approx(0.25, abs=0.01)  # a scale for every 256 values


def test_vectors_stay_in_32_bits() -> None:
    pytest.importorskip("bitsandbytes")
    p = matrix(9)
    optimizer = ProjectedAdamW([p], bits=8)
    run(optimizer, p, gradients((9,), 1))
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_eight_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="bits=8 needs bitsandbytes"):
        ProjectedAdamW([matrix(4, 4)], bits=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"gap": 0}, "gap must be at least 1, got 0"),
        ({"projection": "both"}, "projection must be one of 'std', .* got 'both'"),
        ({"bits": 4}, "bits must be one of 8, 32, got 4"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ProjectedAdamW([matrix(4, 4)], **given)
