"""S2FT's channels: how they are drawn, that nothing else moves, and adapters on different ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pegbox
from pegbox.checks.lab import bits, shake
from pegbox.checks.models import text
from pegbox.core import Stack, Sum, Tuned
from pegbox.core.errors import SettingsError, TargetError
from pegbox.methods.s2ft import S2FT, ChannelGraft

from .tiny import family

INNER, HIDDEN, LAYERS, HEADS, KV = 40, 16, 6, 4, 2
ALL = {"down": 0.1, "up": 0.15, "out": 0.4, "v": 0.4}


def llama(*, bias: bool = False, kv: int = KV) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv,
            vocab_size=60,
            attention_bias=bias,
            mlp_bias=bias,
            initializer_range=0.2,
            pad_token_id=0,
        )
    ).eval()


def grafts(tuned: Tuned, name: str | None = None) -> dict[str, ChannelGraft]:
    """By path, the grafts of one adapter."""
    found = {}
    for path, site in tuned.sites.items():
        graft = site.grafts.get(name or tuned.active[0])
        if isinstance(graft, ChannelGraft):
            found[path] = graft
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**text(0)).logits
    return out


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_size_is_the_grid_s_share(share: float) -> None:
    tuned = pegbox.tune(llama(), "s2ft", down=share)
    assert tuned.count()[0] == int(share * INNER * LAYERS) * HIDDEN
    assert pegbox.tune(llama(), "s2ft", down=1e-9).count()[0] == HIDDEN  # never nothing


def test_units_are_drawn_over_all_layers_together() -> None:
    """So a layer has more or fewer; each unit is as likely (chi-squared, 98 % quantile of 39 degrees: 58.3)."""
    method = S2FT(down=0.1)
    found = {len(g.index) for g in grafts(pegbox.tune(llama(), method)).values()}
    assert len(found) > 1
    counts: Counter[int] = Counter()
    model = llama()
    for seed in range(60):
        tuned = pegbox.tune(model, "s2ft", down=0.1, draw_seed=seed)
        for graft in grafts(tuned).values():
            assert graft.index.unique().equal(graft.index)
            counts.update(graft.index.tolist())
        tuned.detach()
    expected = sum(counts.values()) / INNER
    assert sum((counts[j] - expected) ** 2 for j in range(INNER)) / expected < 58.3


def test_the_draw_is_the_setting_s_seed_alone() -> None:
    first = pegbox.tune(llama(), "s2ft", **ALL)
    again = pegbox.tune(llama(), S2FT(**ALL), seed=5)
    other = pegbox.tune(llama(), S2FT(**ALL, draw_seed=1))
    assert all(g.index.equal(grafts(again)[path].index) for path, g in grafts(first).items())
    assert {p: g.index.tolist() for p, g in grafts(first).items()} != {
        p: g.index.tolist() for p, g in grafts(other).items()
    }


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_is_chosen_by_whole_groups(kv: int) -> None:
    """Of v the rows of a head; of out the columns of all queries that share one: GQA, MQA and plain attention."""
    tuned = pegbox.tune(llama(kv=kv), "s2ft", down=0.0, out=0.5, v=0.5)
    wide = {"v_proj": HIDDEN // HEADS, "o_proj": HIDDEN // kv}
    units = Counter()
    for path, graft in grafts(tuned).items():
        name = path.rpartition(".")[2]
        groups = graft.index.view(-1, wide[name])
        assert all(group.equal(torch.arange(group[0], group[0] + wide[name])) for group in groups)
        assert all(int(group[0]) % wide[name] == 0 for group in groups)
        units[name] += len(groups)
    assert units == {"v_proj": int(0.5 * kv * LAYERS), "o_proj": int(0.5 * kv * LAYERS)}


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_chosen_channels_move(bias: bool) -> None:
    model = llama(bias=bias)
    tuned = pegbox.tune(model, "s2ft", **ALL).train()
    before, chosen = bits(model), grafts(tuned)
    optimizer = torch.optim.AdamW(tuned.groups(1e-2, 0.1))
    for step in range(3):
        tuned(**text(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    merged = bits(tuned.merge())
    for key, value in merged.items():
        moved = value != before[key]
        graft = chosen.get(key.removesuffix(".weight"))
        if graft is None or key.endswith("bias"):
            assert not moved.any()
            continue
        want = torch.zeros_like(moved).index_fill_(graft.side, graft.index, True)
        assert moved.equal(want)
    assert all(torch.equal(value, before[key]) for key, value in bits(tuned.detach()).items())


def apart(tuned: Tuned) -> Tuned:
    """Adapters a and b on channels that they do not share."""
    for path, graft in grafts(tuned, "b").items():
        taken = set(grafts(tuned, "a")[path].index.tolist()) if path in grafts(tuned, "a") else set()
        free = [j for j in range(graft.width) if j not in taken]
        graft.index.copy_(torch.tensor(free[: len(graft.index)]))
    return tuned


def pair() -> Tuned:
    tuned = pegbox.tune(llama(), "s2ft", down=0.1, up=0.1, name="a")
    shake(tuned, 1)
    tuned.add("b", S2FT(down=0.15, up=0.15, draw_seed=3))
    return apart(shake(tuned, 2))


@pytest.mark.parametrize("plan", [Stack("a", "b"), Stack("b", "a"), Sum(a=1.0, b=1.0)])
def test_adapters_on_other_channels_fuse_to_the_sum_of_both(plan: Any) -> None:
    tuned, base = pair(), bits(llama())
    alone = {}
    for name in ("a", "b"):
        alone[name] = bits(tuned.use(name).merge())
        tuned.unmerge()
    have = logits(tuned.use(plan))
    merged = tuned.merge()
    assert torch.allclose(logits(merged), have, atol=1e-5)
    for key, value in bits(merged).items():
        mine = alone["a"][key] != base[key]
        assert torch.equal(value, torch.where(mine, alone["a"][key], alone["b"][key]))  # exact, no sum is rounded
    assert all(torch.equal(value, base[key]) for key, value in bits(tuned.detach()).items())


def test_switching_is_each_alone() -> None:
    tuned = pair()
    a, b = logits(tuned.use("a")), logits(tuned.use("b"))
    assert torch.equal(logits(tuned.use("a")), a)
    assert not torch.allclose(a, b)
    with tuned.disabled():
        assert torch.equal(logits(tuned), logits(llama()))


@pytest.mark.parametrize("smallest", [False, True])
def test_by_weight(smallest: bool) -> None:
    tuned = pegbox.tune(llama(), "s2ft", **ALL, choose="weight", smallest=smallest)
    drawn = pegbox.tune(llama(), "s2ft", **ALL)
    for path, graft in grafts(tuned).items():
        assert len(graft.index) == len(grafts(drawn)[path].index)  # each layer has as many
        norms = tuned.sites[path].read("weight").square().sum(1 - graft.side).view(-1, graft.unit).sum(1)
        order = norms.argsort(descending=not smallest)[: len(graft.index) // graft.unit]
        assert sorted(order.tolist()) == sorted({int(j) // graft.unit for j in graft.index})


@pytest.mark.parametrize("smallest", [False, True])
def test_by_activation(smallest: bool, tmp_path: Path) -> None:
    method = S2FT(down=0.1, v=0.4, choose="activation", smallest=smallest)
    model = llama()
    tuned = pegbox.tune(model, method)
    batches = [text(seed) for seed in range(3)]
    seen: dict[str, Tensor] = {}
    for path, graft in grafts(tuned).items():

        def note(m: nn.Module, args: Any, y: Tensor, path: str = path, side: int = graft.side) -> None:
            x: Tensor = args[0] if side else y
            seen[path] = seen.get(path, torch.zeros(x.shape[-1])) + x.detach().square().sum((0, 1))

        model.get_submodule(path).register_forward_hook(note)
    pegbox.Callback(tuned, save=False).calibrate(batches)
    for path, graft in grafts(tuned).items():
        norms = seen[path].view(-1, graft.unit).sum(1)
        order = norms.argsort(descending=not smallest)[: len(graft.index) // graft.unit]
        assert sorted(order.tolist()) == sorted({int(j) // graft.unit for j in graft.index})
    shake(tuned).save(tmp_path)
    assert torch.allclose(logits(pegbox.load(llama(), tmp_path)), logits(tuned))


def test_data_is_wanted_for_activations_alone() -> None:
    assert S2FT(choose="activation").calibrates()
    for choose in ("random", "weight"):
        tuned = pegbox.tune(llama(), S2FT(choose=choose))  # type: ignore[arg-type]
        acts = pegbox.Callback(tuned, save=False)
        assert not acts.needs_data
        before = {path: g.index.clone() for path, g in grafts(tuned).items()}
        acts.calibrate([text(0)])
        assert all(g.index.equal(before[path]) for path, g in grafts(tuned).items())


def test_of_the_down_projection_s_input_a_share_is_kept() -> None:
    tuned = pegbox.tune(llama(), "s2ft", down=0.2)
    path, graft = next(iter(grafts(tuned).items()))
    module, x = tuned.model.get_submodule(path), torch.randn(7, 9, INNER, requires_grad=True)
    sizes = []

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.shape not in (module.weight.shape, graft.d.shape):
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    assert sizes == [x.numel() * len(graft.index) // INNER]


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"down": 0.0}, SettingsError, "one must be above 0"),
        ({"targets": "attn.v"}, SettingsError, r"s2ft\.v is 0"),
        ({"targets": "no_such"}, TargetError, "no_such"),
        ({"down": 1.5}, SettingsError, "at most 1"),
        ({"choose": "luck"}, SettingsError, "'random'"),
    ],
)
def test_mistakes(settings: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pegbox.tune(llama(), "s2ft", **settings)


def test_heads_need_a_configuration_that_counts_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention()}) for _ in range(2))

    with pytest.raises(TargetError, match=r"key and value heads at layers\.0\.self_attn\.v_proj is not known"):
        pegbox.tune(Model(), "s2ft", down=0.0, v=0.5)


def test_a_module_without_a_role_has_the_share_of_down() -> None:
    tuned = pegbox.tune(family("mlp"), "s2ft", down=0.25, targets="mix")
    ((path, graft),) = grafts(tuned).items()
    assert (path, graft.side, graft.d.shape) == ("mix", 1, (48, 8))
