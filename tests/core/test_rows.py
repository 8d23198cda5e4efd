"""Batches whose rows use different adapters: what shares a pass, what runs in groups, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox.checks.lab import shake
from pegbox.checks.models import FAMILIES, PAD, text, translation
from pegbox.core import Base, Graft, Method, Site, Traits, rows, setting
from pegbox.core.errors import CannotMix
from pegbox.methods.lora import LoRA
from pegbox.methods.miss import MiSS
from pegbox.methods.prefix_tuning import PrefixTuning
from pegbox.methods.prompt_tuning import PromptTuning

BATCHES = {"llama": text, "gpt2": text, "t5": translation}
KINDS: dict[str, Method] = {
    "prompt": PromptTuning(tokens=3),
    "shorter": PromptTuning(tokens=1),
    "prefix": PrefixTuning(tokens=4),
    "short": PrefixTuning(tokens=2),
    "projected": PrefixTuning(tokens=2, projection=True),
    "lora": LoRA(rank=2, alpha=4.0),
    "miss": MiSS(rank=3),
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


def all_kinds(name: str) -> Any:
    """A model with an adapter of every kind."""
    tuned = pegbox.tune(family(name))
    for seed, (kind, method) in enumerate(KINDS.items()):
        shake(tuned.add(kind, method, seed=seed), seed)
    return tuned.eval()


ORDERS = [
    ("prompt", "shorter", None, "prompt"),
    ("prefix", "short", None, "projected"),
    ("prompt", "prefix", "shorter", "short"),
    ("lora", "prompt", "prefix", None),
    ("lora", "miss", None, "lora"),
]


MIXED = [(name, names) for name in BATCHES for names in ORDERS]
APART = [(name, names) for name, names in MIXED if name == "t5" and {"prompt", "prefix"} <= set(names)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "names"), [pair for pair in MIXED if pair not in APART])
def test_every_row_is_as_alone(name: str, names: tuple[str | None, ...]) -> None:
    tuned, batch = all_kinds(name), {k: v for k, v in BATCHES[name](0).items() if k != "labels"}
    with tuned.rows(names):
        have = tuned(**batch).logits
    for row, adapter in enumerate(names):
        want = tuned.use(adapter)(**batch).logits if adapter else family(name)(**batch).logits
        assert torch.allclose(have[row], want[row], atol=1e-5), (row, adapter)


@torch.no_grad()
@pytest.mark.parametrize(("name", "names"), APART)
def test_prompts_and_prefixes_of_relative_positions_are_kept_apart(name: str, names: tuple[str | None, ...]) -> None:
    """Padding for the prompt of one row would come between another's prefix and its text."""
    tuned, batch = all_kinds(name), BATCHES[name](0)
    with tuned.rows(names), pytest.raises(CannotMix, match="batches of their own"):
        tuned(**batch)


@torch.no_grad()
@pytest.mark.parametrize(("name", "names"), [pair for pair in MIXED if pair not in APART])
def test_every_row_writes_as_alone(name: str, names: tuple[str | None, ...]) -> None:
    """One cache for all, rows padded on the left."""
    tuned, ids = all_kinds(name), BATCHES[name](0)["input_ids"]
    lengths = [8, 5, 3, 6]
    padded, mask = torch.full_like(ids, PAD), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, 8 - length :], mask[row, 8 - length :] = ids[row, :length], 1
    with tuned.rows(names):
        have = written(tuned, padded, mask)
    for row, (adapter, length) in enumerate(zip(names, lengths, strict=True)):
        one, ones = ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long)
        model = tuned.use(adapter) if adapter else family(name)
        assert torch.equal(have[row, -5:], written(model, one, ones)[0, -5:]), (row, adapter)


def written(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5}
    tokens: Tensor = model.generate(**given, do_sample=False, use_cache=True)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_without_a_mask_are_as_alone(name: str) -> None:
    tuned, batch = all_kinds(name), {k: v for k, v in BATCHES[name](0).items() if k not in ("labels", "attention_mask")}
    names = ("prompt", "prefix" if name == "llama" else "lora", "shorter", None)
    with tuned.rows(names):
        have = tuned(**batch).logits
    for row, adapter in enumerate(names):
        want = tuned.use(adapter)(**batch).logits if adapter else family(name)(**batch).logits
        assert torch.allclose(have[row], want[row], atol=1e-5), (row, adapter)


def test_low_rank_methods_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA next to MiSS next to the base: nothing runs in groups."""
    tuned = all_kinds("llama")
    monkeypatch.setattr(rows, "_grouped_rows", lambda *_: pytest.fail("rows ran in groups"))
    with tuned.rows(["lora", "miss", None, "lora"]), torch.no_grad():
        tuned(**text(0))


class Louder(Graft):
    """Around a whole attention, whose outputs are several."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        first, *rest = base(*args, **kwargs)
        return (first * self.gain, *rest)


@dataclass(frozen=True, kw_only=True)
class Loud(Method):
    targets: str | tuple[str, ...] = setting("attn", "attentions")
    traits: ClassVar[Traits] = Traits(seams=("output",), merge="no")
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def graft(self, site: Site, shared: nn.Module | None) -> Louder:
        return Louder()


def loud(name: str) -> Any:
    tuned = pegbox.tune(family(name), Loud(), name="a")
    shake(tuned, 1)
    return shake(tuned.add("b", Loud()), 2).eval()


@torch.no_grad()
@pytest.mark.parametrize("names", [("a", None, "b", "a"), (None, None, "a", "a")])
@pytest.mark.parametrize("name", BATCHES)
def test_what_is_not_by_rows_is_kept(name: str, names: tuple[str | None, ...]) -> None:
    """A T5 attention gives its position bias, which all rows share, beside its output."""
    tuned, batch = loud(name), {k: v for k, v in BATCHES[name](0).items() if k != "labels"}
    with tuned.rows(names):
        have = tuned(**batch, use_cache=False).logits
    for row, adapter in enumerate(names):
        want = tuned.use(adapter)(**batch).logits if adapter else family(name)(**batch).logits
        assert torch.allclose(have[row], want[row], atol=1e-5), (row, adapter)


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_groups_share_no_cache(name: str) -> None:
    tuned, batch = loud(name), BATCHES[name](0)
    with tuned.rows(["a", None, "b", "a"]), pytest.raises(CannotMix, match="use_cache=False"):
        written(tuned, batch["input_ids"], batch["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_one_group_keeps_its_cache(name: str) -> None:
    tuned, batch = loud(name), BATCHES[name](0)
    with tuned.rows(["a"] * 4):
        have = written(tuned, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(have, written(tuned.use("a"), batch["input_ids"], batch["attention_mask"]))


def test_a_loss_of_groups_is_refused() -> None:
    """A model that is called group by group has a loss of each; none of them is the batch's."""
    tuned = pegbox.tune(family("bert"), PromptTuning(tokens=3), name="a")
    batch = FAMILIES["bert"].batch(0)
    with tuned.rows(["a", None, "a", None]), pytest.raises(CannotMix, match="labels"):
        tuned(**batch)
