"""LISA's blocks: which train, how they are drawn, what is held for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pegbox
from pegbox.checks.lab import bits
from pegbox.checks.models import text
from pegbox.core import Tuned
from pegbox.core.errors import SettingsError, TargetError
from pegbox.methods.lisa import LISA

from .tiny import family

BLOCKS = 4
Optimizer = torch.optim.Optimizer


def llama(blocks: int = BLOCKS, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 60}
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=blocks, tie_word_embeddings=tied, initializer_range=0.1, pad_token_id=0, **sizes)
    )


def trained(tuned: Tuned, steps: int, *, decay: float = 0.1) -> Iterator[tuple[int, Optimizer]]:
    """A loop of one's own; gives every step after its update, with the gradients still there."""
    acts, optimizer = pegbox.Callback(tuned.train()), torch.optim.AdamW(tuned.groups(1e-2, decay))
    for step in range(steps):
        acts.before_step(step, steps, optimizer)
        tuned(**text(step)).loss.backward()
        optimizer.step()
        yield step, optimizer
        acts.after_step(step, steps)
        optimizer.zero_grad()


def block_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def training_now(model: nn.Module) -> set[int]:
    blocks = {block_of(name) for name, p in model.named_parameters() if p.requires_grad}
    return {block for block in blocks if block is not None}


def moments(optimizer: Optimizer) -> int:
    """Numbers that Adam holds, but for its counts of steps."""
    return sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")


@pytest.mark.parametrize("active", [1, 2, 3])
def test_only_the_active_blocks_train_and_are_held(active: int) -> None:
    model = llama()
    tuned = pegbox.tune(model, "lisa", active=active, period=3)
    always = [n for n, _ in model.named_parameters() if block_of(n) is None]
    assert len(always) == 3  # embedding, norm, head
    seen, before, drawn = set(), bits(model), {0, 1, 2, 3}
    for step, optimizer in trained(tuned, 12):
        if step % 3 == 0:
            drawn = training_now(model)
            seen |= drawn
        assert training_now(model) == drawn
        assert len(drawn) == active
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == {n for n, p in model.named_parameters() if p.grad is not None}
        assert names.issuperset(always)
        now = bits(model)
        assert {n for n in now if not torch.equal(now[n], before[n])} == names  # no update, no decay of the others
        before = now
        assert moments(optimizer) == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(seen) > active
    assert len(tuned.trainable()) < len(list(model.parameters()))


def test_every_block_is_as_likely() -> None:
    """Chi-squared of 2000 draws against 3 of 12 each; 24.7 is its 99 % quantile for 11 degrees of freedom."""
    blocks = [f"layers.{i}" for i in range(12)]
    method, draws = LISA(active=3, period=5), 2000
    counts = Counter(block for k in range(draws) for block in method.drawn(blocks, 5 * k))
    expected = draws * 3 / 12
    # without replacement, counts vary less than independent draws by (1 - 3/12) * 12/11
    chi_squared = sum((counts[b] - expected) ** 2 / expected for b in blocks) / ((1 - 3 / 12) * 12 / 11)
    assert chi_squared < 24.7


def test_the_draw_is_of_seed_and_step_alone() -> None:
    blocks = [f"layers.{i}" for i in range(12)]
    method = LISA(active=3, period=5)
    schedule = [method.drawn(blocks, step) for step in range(40)]
    assert schedule == [LISA(active=3, period=5).drawn(blocks, step) for step in range(40)]
    assert [method.drawn(blocks, step) for step in reversed(range(40))] == schedule[::-1]
    assert all(schedule[step] == schedule[step - step % 5] for step in range(40))
    assert len({tuple(sorted(drawn)) for drawn in schedule}) > 4
    assert schedule != [LISA(active=3, period=5, draw_seed=1).drawn(blocks, step) for step in range(40)]


def test_all_blocks_are_full_fine_tuning() -> None:
    ours, theirs = llama(), llama()
    for _ in zip(
        trained(pegbox.tune(ours, "lisa", active=BLOCKS, period=2), 6),
        trained(pegbox.tune(theirs, "full"), 6),
        strict=True,
    ):
        pass
    assert all(torch.equal(value, bits(theirs)[key]) for key, value in bits(ours).items())


def test_a_block_that_comes_back_starts_anew() -> None:
    """Its bias correction is at 1, its moments those of one gradient; what always trains goes on."""
    model = llama(2)
    tuned = pegbox.tune(model, "lisa", active=1, period=2, draw_seed=1)
    entered: dict[int, int] = {}
    came_back = 0
    last: set[int] = set()
    for step, optimizer in trained(tuned, 16):
        now = training_now(model)
        came_back += sum(block in entered and block not in last for block in now)
        entered |= dict.fromkeys(now - last, step)
        last = now
        for name, p in model.named_parameters():
            block = block_of(name)
            if block is None:
                assert optimizer.state[p]["step"] == step + 1
            elif block in now:
                state = optimizer.state[p]
                assert state["step"] == step - entered[block] + 1
                if state["step"] == 1:
                    assert torch.allclose(state["exp_avg"], 0.1 * p.grad)
    assert came_back > 1


def test_a_tied_head_counts_once() -> None:
    model = llama(tied=True)
    tuned = pegbox.tune(model, "lisa", active=1, period=2)
    for _, optimizer in trained(tuned, 3):
        assert moments(optimizer) == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_what_lies_outside_the_blocks_always_trains(name: str) -> None:
    model = family(name)
    tuned = pegbox.tune(model, "lisa", active=1, period=1)
    blocks = tuple(f"{path}." for path in tuned.anatomy.blocks)
    tuned.method.before_step(tuned, 0, 1)
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith(blocks))
    assert len({n.partition(b)[0] for b in blocks for n, p in model.named_parameters() if p.requires_grad}) > 0
    resting = [b for b in blocks if not any(p.requires_grad for n, p in model.named_parameters() if n.startswith(b))]
    assert len(resting) == len(blocks) - 1


def test_layers_are_those_to_draw_from() -> None:
    model = llama()
    tuned = pegbox.tune(model, "lisa", active=1, period=1, layers="-2")
    seen = set()
    for _ in trained(tuned, 8):
        seen |= training_now(model)
    assert seen == {2, 3}


def test_targets_narrow_what_trains() -> None:
    model = llama()
    tuned = pegbox.tune(model, "lisa", active=1, period=1, targets="mlp,head")
    assert {k for k in tuned.state() if "layers" not in k} == {"base.lm_head.weight"}
    assert all(".mlp." in k for k in tuned.state() if "layers" in k)


@pytest.mark.parametrize(
    ("make", "settings", "error", "named"),
    [
        (llama, {"active": 5}, SettingsError, r"lisa.active must be 1..4, .* got 5"),
        (llama, {"active": 3, "layers": "0-1"}, SettingsError, "1..2"),
        (llama, {"targets": "head", "active": 1}, TargetError, "nothing inside"),
        (lambda: family("mlp"), {"active": 1}, TargetError, "this model has none"),
    ],
)
def test_mistakes(make: Callable[[], Any], settings: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pegbox.tune(make(), "lisa", **settings)


def test_other_names() -> None:
    assert pegbox.method("lisa", lisa_activated_layers=3, lisa_interval_steps=7) == LISA(active=3, period=7)


def test_without_the_loop_s_word_all_trains(tmp_path: Any) -> None:
    """Before its first step and after its last nothing rests; a file holds every tensor."""
    model = llama()
    tuned = pegbox.tune(model, "lisa", active=1, period=2)
    assert len(tuned.trainable()) == len(list(model.parameters()))
    want: dict[str, Tensor] = {}
    for _ in trained(tuned, 3):
        want = {k: v.clone() for k, v in tuned.state().items()}
    tuned.save(tmp_path)
    again = pegbox.load(llama(), tmp_path)
    assert all(torch.equal(value, want[key]) for key, value in again.state().items())
    assert len(again.trainable()) == len(want)
