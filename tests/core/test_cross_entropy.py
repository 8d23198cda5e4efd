from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pegbox.core.cross_entropy import (
    chunked_cross_entropy,
    chunked_head_loss,
    chunked_head_token_losses,
    chunked_token_losses,
    token_log_probs,
)
from pegbox.core.errors import SettingsError

N, D, V = 37, 8, 50  # tokens, width, vocabulary
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Case:
    """A random head and batch, about a third of it without labels."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, bias: bool = True) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, D, generator=draw).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=draw).to(dtype).requires_grad_()
        self.bias = torch.randn(V, generator=draw).to(dtype).requires_grad_() if bias else None
        self.labels = torch.randint(V, (N,), generator=draw)
        self.labels[torch.rand(N, generator=draw) < 0.3] = -100
        self.token_weights = torch.rand(N, generator=draw, dtype=torch.float64 if dtype == torch.float64 else None)

    @property
    def matrix(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def losses(self, smoothing: float = 0.0, scale: float = 1.0, softcap: float | None = None) -> Tensor:
        """Of each token, from all logits."""
        z = self.head(self.hidden)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z, self.labels, label_smoothing=smoothing, reduction="none")

    def expected(self, weights: Tensor | None = None, reduction: str = "mean", **rule: Any) -> Tensor:
        weights = torch.ones(N) if weights is None else weights
        total = (self.losses(**rule) * weights).sum()
        return total if reduction == "sum" else total / weights[self.labels != -100].sum().detach()


def assert_same(case: Case, got: Tensor, expected: Tensor, tensors: list[Tensor] | None = None) -> None:
    """Value, and gradients relative to the largest."""
    tensors = tensors or case.tensors
    tolerance = TOLERANCE[case.hidden.dtype]
    pairs = [(got, expected)]
    pairs += zip(torch.autograd.grad(got, tensors), torch.autograd.grad(expected, tensors), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


OPTIONS = {
    "plain": {},
    "smoothed": {"smoothing": 0.1},
    "scaled": {"scale": 0.3},
    "softcap": {"softcap": 5.0},
    "all": {"smoothing": 0.2, "scale": 1.7, "softcap": 4.0},
}


def arguments(rule: dict[str, float]) -> dict[str, Any]:
    """A case's rule as keyword arguments."""
    names = {"smoothing": "label_smoothing", "scale": "logit_scale", "softcap": "softcap"}
    return {names[k]: v for k, v in rule.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_full_logits(dtype: torch.dtype, option: str, reduction: str, weighted: bool) -> None:
    case, rule = Case(dtype), OPTIONS[option]
    weights = case.token_weights if weighted else None
    options = {"reduction": reduction, "token_weights": weights, "chunk": 7, **arguments(rule)}
    expected = case.expected(weights, reduction, **rule)
    assert_same(case, chunked_cross_entropy(*case.matrix, **options), expected)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_head_equals_full_logits(option: str, reduction: str) -> None:
    case, rule = Case(), OPTIONS[option]
    options = {"reduction": reduction, "token_weights": case.token_weights, "chunk": 7, **arguments(rule)}
    got = chunked_head_loss(case.head, case.hidden, case.labels, **options)
    assert_same(case, got, case.expected(case.token_weights, reduction, **rule))


@pytest.mark.parametrize("chunk", [1, 2, 7, 26, 36, 37, 1000, None])
@pytest.mark.parametrize("bias", [False, True])
def test_chunk_size_does_not_matter(chunk: int | None, bias: bool) -> None:
    case = Case(bias=bias)
    assert_same(case, chunked_cross_entropy(*case.matrix, chunk=chunk), case.expected())


def test_bfloat16_loss_has_float32_statistics() -> None:
    """Equal to float32 arithmetic on the same rounded logits, far closer than bfloat16's own resolution of 4e-3."""
    case = Case(torch.bfloat16, bias=False)
    loss = chunked_cross_entropy(*case.matrix)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case.expected().item(), rel=1e-5)


def test_large_logits_and_certain_tokens_stay_finite() -> None:
    case = Case(torch.float32)
    hidden = (case.hidden * 1e3).detach().requires_grad_()
    loss = chunked_cross_entropy(hidden, case.weight, case.labels)
    expected = F.cross_entropy(hidden @ case.weight.T, case.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(case, loss, expected, [hidden, case.weight])


def test_other_ignore_index() -> None:
    case = Case()
    labels = torch.where(case.labels == -100, 3, case.labels)
    got = chunked_cross_entropy(case.hidden, case.weight, labels, ignore_index=3)
    expected = F.cross_entropy(case.hidden @ case.weight.T, labels, ignore_index=3)
    assert_same(case, got, expected, [case.hidden, case.weight])


def test_token_weights_can_be_learned() -> None:
    case = Case()
    weights = case.token_weights.requires_grad_()
    got = chunked_cross_entropy(*case.matrix, token_weights=weights, reduction="sum")
    assert_same(case, got, case.expected(weights, "sum"), [*case.tensors, weights])


def test_weights_of_zero_and_one_are_a_mask() -> None:
    case = Case()
    mask = torch.arange(N) % 2
    masked = case.labels.masked_fill(mask == 0, -100)
    got = chunked_cross_entropy(*case.matrix, token_weights=mask)
    assert_same(case, got, chunked_cross_entropy(case.hidden, case.weight, masked, case.bias))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    tensors = [t for t in case.tensors if t.requires_grad]
    assert_same(case, chunked_cross_entropy(*case.matrix), case.expected(), tensors)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss", [chunked_cross_entropy, None], ids=["matrix", "head"])
def test_no_label_gives_zero_and_zero_gradients(reduction: str, loss: Callable[..., Tensor] | None) -> None:
    case = Case()
    labels = torch.full_like(case.labels, -100)
    if loss is None:
        value = chunked_head_loss(case.head, case.hidden, labels, reduction=reduction)
    else:
        value = loss(case.hidden, case.weight, labels, case.bias, reduction=reduction)
    value.backward()
    assert value.item() == 0.0
    assert all(t.grad is not None and not t.grad.any() for t in case.tensors)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    case = Case()
    value = chunked_cross_entropy(case.hidden[:tokens], case.weight, torch.zeros(tokens, dtype=torch.long))
    expected = F.cross_entropy(case.hidden[:tokens] @ case.weight.T, torch.zeros(tokens).long(), reduction="sum")
    assert value.item() == pytest.approx(expected.item())


def test_without_gradients_none_are_made() -> None:
    case = Case()
    with torch.no_grad():
        value = chunked_cross_entropy(*case.matrix, chunk=7)
    assert not value.requires_grad
    assert value.item() == pytest.approx(case.expected().item())


def test_autocast_runs_in_its_dtype_and_keeps_float32_gradients() -> None:
    case = Case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_cross_entropy(*case.matrix)
        expected = F.cross_entropy(case.head(case.hidden).float(), case.labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = zip(torch.autograd.grad(value, case.tensors), torch.autograd.grad(expected, case.tensors), strict=True)
    for ours, theirs in grads:
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


def test_gradient_scale_and_retained_graph() -> None:
    case = Case()
    loss = chunked_cross_entropy(*case.matrix)
    once = torch.autograd.grad(loss, case.tensors, retain_graph=True)
    thrice = torch.autograd.grad(3.0 * loss, case.tensors)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3.0 * a, b)


def test_second_derivatives_are_refused() -> None:
    case = Case()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(chunked_cross_entropy(*case.matrix), case.hidden, create_graph=True)


def test_unknown_reduction_is_named() -> None:
    case = Case()
    with pytest.raises(SettingsError, match="unknown reduction 'average'"):
        chunked_cross_entropy(*case.matrix, reduction="average")
    with pytest.raises(SettingsError, match="did you mean 'mean'"):
        chunked_head_loss(case.head, case.hidden, case.labels, reduction="means")


# -- one value a token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("option", OPTIONS)
def test_token_losses(trains: bool, option: str) -> None:
    case, rule = Case(), OPTIONS[option]
    case.weight.requires_grad_(trains)
    worth = torch.linspace(-1, 2, N, dtype=torch.float64)  # any later arithmetic on them
    got = chunked_token_losses(*case.matrix, chunk=7, **arguments(rule))
    torch.testing.assert_close(got, case.losses(**rule))
    tensors = [t for t in case.tensors if t.requires_grad]
    assert_same(case, (got * worth).sum(), (case.losses(**rule) * worth).sum(), tensors)


def test_token_log_probs_of_a_frozen_head() -> None:
    case = Case(bias=False)
    case.weight.requires_grad_(False)
    got = token_log_probs(*case.matrix, chunk=7)
    everything = F.log_softmax(case.hidden @ case.weight.T, -1)
    expected = everything.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1) * (case.labels != -100)
    torch.testing.assert_close(got, expected)
    assert_same(case, F.logsigmoid(got.sum() / 50), F.logsigmoid(expected.sum() / 50), [case.hidden])


def test_leading_dimensions_reach_the_head() -> None:
    """A head may treat rows of a batch differently, so a batch (B, T, D) comes to it in chunks (B, t, D)."""
    case = Case(bias=False)
    hidden = case.hidden[:36].unflatten(0, (3, 12))
    labels = case.labels[:36].unflatten(0, (3, 12)).clone()
    labels[:, 4] = -100
    per_row = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    seen: list[torch.Size] = []

    def head(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return per_row * F.linear(x, case.weight)

    got = chunked_head_token_losses(head, hidden, labels, chunk=9)
    z = (per_row * F.linear(hidden, case.weight)).flatten(0, 1)
    torch.testing.assert_close(got, F.cross_entropy(z, labels.flatten(), reduction="none").view(3, 12))
    assert {s[0] for s in seen} == {3}
    assert max(s[1] for s in seen) == 3
    assert sum(s[1] for s in seen) <= 11  # position 4 has no label anywhere


def test_any_head_gives_gradients_to_what_it_holds() -> None:
    case = Case(torch.float64)
    head = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, V)).double()
    tensors = [case.hidden, *head.parameters()]
    got = chunked_head_loss(head, case.hidden, case.labels, chunk=5)
    assert_same(case, got, F.cross_entropy(head(case.hidden), case.labels), tensors)


def test_dropout_in_a_head_is_the_same_in_both_passes() -> None:
    case = Case()
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V, bias=False)).double().train()
    torch.manual_seed(0)
    got = torch.autograd.grad(chunked_head_loss(head, case.hidden, case.labels, chunk=1000), head[1].weight)[0]
    torch.manual_seed(0)
    kept = case.labels != -100
    expected = F.cross_entropy(head(case.hidden[kept]), case.labels[kept])
    torch.testing.assert_close(got, torch.autograd.grad(expected, head[1].weight)[0])


# -- memory and speed --------------------------------------------------------------------------------------------------


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that any operator makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    return max(event.self_cpu_memory_usage for event in record.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_all_logits_never_exist(dtype: torch.dtype, trains: bool) -> None:
    tokens, width, vocabulary, chunk = 512, 16, 1000, 64
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=trains)
    labels = torch.randint(vocabulary, (tokens,))
    row = vocabulary * 4  # float32

    def full() -> None:
        F.cross_entropy(F.linear(hidden, weight).float(), labels).backward()

    def chunked() -> None:
        chunked_cross_entropy(hidden, weight, labels, chunk=chunk).backward()

    def generic() -> None:
        chunked_head_loss(lambda x: F.linear(x, weight), hidden, labels, chunk=chunk).backward()

    assert largest_allocation(full) >= tokens * row
    assert largest_allocation(chunked) <= chunk * row
    assert largest_allocation(generic) <= chunk * row


def test_tokens_without_labels_are_not_multiplied() -> None:
    """Their rows are not even read: nan in them does not show."""
    case = Case(bias=False)
    with torch.no_grad():
        case.hidden[case.labels == -100] = torch.nan
    loss = chunked_cross_entropy(*case.matrix)
    loss.backward()
    assert loss.isfinite()
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    assert case.hidden.grad.isfinite().all()
    assert case.weight.grad.isfinite().all()


def test_the_operator_is_well_formed() -> None:
    """Schema, shapes without data, and autograd registration, by torch's own checker."""
    case = Case(torch.float32)
    inputs = (*(t.detach() for t in (case.hidden, case.weight, case.bias)), case.labels, None)  # type: ignore[union-attr]
    torch.library.opcheck(
        torch.ops.pegbox.head_cross_entropy.default,
        (*inputs, -100, 0.1, 0.5, 3.0, 7, True, True, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_to_one_graph_whatever_is_labelled() -> None:
    case = Case(torch.float32)
    step = torch.compile(
        lambda x, y: chunked_cross_entropy(x * 2, case.weight, y, case.bias), backend="aot_eager", fullgraph=True
    )
    for unlabelled in (0, 5, N):
        labels = case.labels.clone()
        labels[:unlabelled] = -100
        expected = chunked_cross_entropy(case.hidden * 2, case.weight, labels, case.bias)
        assert_same(case, step(case.hidden, labels), expected + 0 * case.hidden.sum(), [case.hidden])


def test_any_head_compiles_to_one_graph() -> None:
    case = Case(torch.float32)
    step = torch.compile(
        lambda x, y: chunked_head_loss(case.head, x * 2, y, chunk=16), backend="aot_eager", fullgraph=True
    )
    expected = chunked_head_loss(case.head, case.hidden * 2, case.labels)
    assert_same(case, step(case.hidden, case.labels), expected)
