"""Taps: which blocks are read, that nothing of the trunk is kept, and where the side joins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import anatomy
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES, inputs
from pegbox.core import (
    Anatomy,
    Graft,
    Method,
    SideGraft,
    Site,
    Tape,
    Taps,
    Traits,
    Trunk,
    setting,
    tap_graft,
    tap_sites,
)
from pegbox.core.errors import ModelError, TargetError
from pegbox.core.taps import holder, trunks

TRUNKS = {
    "llama": ["model"],
    "gpt2": ["transformer"],
    "bert": ["bert.encoder"],
    "t5": ["encoder", "decoder"],
    "vit": ["vit"],
}


class MeanGraft(SideGraft):
    """The least side network: a learned weight for each tapped output."""

    def __init__(self, taps: Taps, trunk: Trunk) -> None:
        super().__init__(taps, trunk)
        self.weights = nn.Parameter(torch.zeros(sum(block in taps.read for block in trunk.blocks)))
        self.tapes: list[Tape] = []

    def side(self, tape: Tape) -> Tensor:
        self.tapes.append(tape)
        own = sum(w * h for w, h in zip(self.weights, tape.outputs, strict=True))
        assert isinstance(own, Tensor)
        return own if tape.encoded is None else own + tape.encoded.mean(1, keepdim=True)

    def up(self, states: Tensor) -> Tensor:
        return states


@dataclass(frozen=True, kw_only=True)
class Mean(Method):
    targets: str | tuple[str, ...] = setting("block", "the blocks to read")
    traits: ClassVar[Traits] = Traits(seams=("taps",), merge="no")
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def read(self, anatomy: Anatomy) -> list[str]:
        return anatomy.resolve(self.targets, layers=self.layers, kinds=self.kinds, who="mean")

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return tap_sites(model, anatomy, self.read(anatomy))

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Taps:
        return Taps(model, anatomy, self.read(anatomy))

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, Taps)
        return tap_graft(site, shared, lambda trunk: MeanGraft(shared, trunk))


def build(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


def tuned_on(name: str, **settings: Any) -> tuple[Any, dict[str, MeanGraft]]:
    tuned = pegbox.tune(build(name), Mean(**settings))
    sides = {path: site.chain[0] for path, site in tuned.sites.items() if isinstance(site.chain[0], MeanGraft)}
    with torch.no_grad():
        for side in sides.values():
            side.weights.add_(0.1)
    return tuned, sides


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


@pytest.mark.parametrize("name", TRUNKS)
def test_the_trunks_of_an_architecture(name: str) -> None:
    model = build(name)
    roles = anatomy.of(model)
    found = trunks(model, roles, roles.blocks)
    assert [trunk.path for trunk in found] == TRUNKS[name]
    assert [block for trunk in found for block in trunk.blocks] == roles.blocks
    assert {trunk.width for trunk in found} == {32}
    assert [trunk.causal for trunk in found] == [
        name in ("llama", "gpt2") or trunk.path == "decoder" for trunk in found
    ]
    assert [(trunk.encoder, trunk.crosses) for trunk in found] == (
        [(True, False), (False, True)] if name == "t5" else [(False, False)]
    )


@pytest.mark.parametrize("name", TRUNKS)
def test_blocks_are_read_without_autograd(name: str) -> None:
    tuned, sides = tuned_on(name)
    model, seen = tuned.model, {}
    for path in tuned.anatomy.blocks:
        model.get_submodule(path).register_forward_hook(lambda m, a, out, p=path: seen.update({p: out}))
    FAMILIES[name].loss(tuned).backward()
    outputs = {p: out if isinstance(out, Tensor) else out[0] for p, out in seen.items()}
    assert all(out.grad_fn is None and not out.requires_grad for out in outputs.values())
    for side in sides.values():
        (tape,) = side.tapes
        assert all(torch.equal(t, outputs[b]) for t, b in zip(tape.outputs, side.trunk.blocks, strict=True))
        assert tape.start is not None
        assert tape.start.shape == tape.outputs[0].shape
        assert side.weights.grad is not None
        assert side.weights.grad.all()


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_the_trunk_is_kept(name: str, recompute: bool) -> None:
    """What autograd keeps does not grow with the trunk: no more for two blocks read than for one, but for the taps."""
    counts = []
    for settings in ({}, {"layers": "-1"}):
        tuned, _ = tuned_on(name, **settings)
        model = tuned.train().model
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with kept_for_backward() as saved:
            FAMILIES[name].loss(tuned)
        counts.append(len(saved))
    per_tap = 2  # h and its weight
    assert counts[0] - counts[1] <= per_tap * len(TRUNKS[name]) * 2


def test_layers_choose_what_is_read() -> None:
    tuned, sides = tuned_on("llama", layers="0")
    tuned(**inputs(FAMILIES["llama"].batch(0)))
    assert len(sides["model"].tapes[0].outputs) == 1
    assert set(tuned.sites) == {"model", "model.layers.0", "model.layers.1"}, "all blocks run without autograd"


@pytest.mark.parametrize("name", TRUNKS)
def test_the_tape_is_put_away(name: str) -> None:
    tuned, sides = tuned_on(name)
    tuned(**inputs(FAMILIES[name].batch(0)))
    (taps,) = {id(side.owner[0]): side.owner[0] for side in sides.values()}.values()
    assert taps.tape is None
    assert taps.encoded is None


def test_the_decoder_alone_can_be_read() -> None:
    tuned, sides = tuned_on("t5", targets="decoder.block")
    FAMILIES["t5"].loss(tuned).backward()
    assert set(sides) == {"decoder"}
    assert sides["decoder"].tapes[0].encoded is None


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": False}, {"num_return_sequences": 2, "num_beams": 2}])
def test_the_states_of_an_encoder_follow_generate(how: dict[str, Any]) -> None:
    """With beams, the cache and several returned sequences: what a forward on the written tokens says as well."""
    tuned, _ = tuned_on("t5")
    ids = FAMILIES["t5"].batch(0)["input_ids"]
    out = tuned.generate(
        input_ids=ids, max_new_tokens=4, use_cache=True, return_dict_in_generate=True, output_scores=True, **how
    )
    again = tuned.generate(
        input_ids=ids, max_new_tokens=4, use_cache=False, return_dict_in_generate=True, output_scores=True, **how
    )
    assert torch.equal(out.sequences, again.sequences)


def test_outputs_of_an_encoder_without_the_adapter_are_refused() -> None:
    tuned, _ = tuned_on("t5")
    batch = inputs(FAMILIES["t5"].batch(0))
    with tuned.disabled():
        encoded = tuned.model.get_encoder()(batch["input_ids"])
    with pytest.raises(ModelError, match="without this adapter"):
        tuned(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"])


def deberta() -> Any:
    """A model that goes on from its encoder's list of hidden states, and whose masks are of ones and zeros."""
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        initializer_range=0.1,
    )
    return DebertaV2ForTokenClassification(config).eval()


@pytest.mark.parametrize("as_dict", [True, False])
def test_what_joins_ends_the_list_of_hidden_states(as_dict: bool) -> None:
    ids = inputs(FAMILIES["bert"].batch(0))["input_ids"]
    hidden = deberta().deberta(ids, output_hidden_states=True).hidden_states
    tuned = pegbox.tune(deberta(), Mean())
    with torch.no_grad():
        tuned.sites["deberta.encoder"].chain[0].weights.add_(0.1)
    out = tuned.model.deberta(ids, output_hidden_states=True, return_dict=as_dict)
    last, listed = (out.last_hidden_state, out.hidden_states) if as_dict else out[:2]
    assert torch.allclose(last, hidden[-1] + 0.1 * (hidden[1] + hidden[2]), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(listed, (*hidden[:-1], last), strict=True))


def test_a_side_network_sees_no_padding_behind_a_mask_of_ones_and_zeros() -> None:
    tuned = shake(pegbox.tune(deberta(), "ladder", reduction=4, heads=2)).eval()
    ids = inputs(FAMILIES["bert"].batch(0))["input_ids"][:1]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    padded = tuned(input_ids=ids, attention_mask=mask).logits
    alone = tuned(input_ids=ids[:, :5], attention_mask=mask[:, :5]).logits
    assert torch.allclose(padded[:, :5], alone, atol=1e-5)
    padded.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.trainable().values())


def test_what_has_no_trunk_is_refused() -> None:
    with pytest.raises(TargetError, match="no member of a list"):
        holder("mid_block")
    for model, read, message in (
        (nn.ModuleDict({"a": _tower(), "b": _tower()}), ["a.blocks.0", "b.blocks.0"], "2 stacks of blocks end"),
        (build("t5"), ["encoder.block.0"], "1: name the blocks"),
        (_tower(head=True), ["blocks.0"], "holds its head"),
    ):
        with pytest.raises(TargetError, match=message):
            trunks(model, anatomy.of(model), read)


def _tower(head: bool = False) -> nn.Module:
    tower = nn.Module()
    tower.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
    if head:
        tower.head = nn.Linear(8, 2)
    return tower
