"""Tuned models where the conformance suite does not look: names, plans, mistakes, what falls through to the base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pegbox
from pegbox import Stack, Sum
from pegbox.checks import models
from pegbox.core.errors import AdapterError, CannotDisable, CannotMix, MethodError, SettingsError, TargetError

IDS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return models.llama()


@pytest.fixture
def model() -> nn.Module:
    return llama().eval()


def shaken(tuned: Any, seed: int = 1) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return tuned


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def test_unknown_attributes_are_the_bases(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "lora", rank=2)
    assert tuned.config is model.config
    assert tuned.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 11)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tuned.no_such_thing


def test_a_tuned_model_is_not_tuned_again(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "lora", rank=2)
    for again in (tuned, model):
        with pytest.raises(MethodError, match=r"tuned\.add"):
            pegbox.tune(again, "lora")


def test_names(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "lora", rank=2, name="a")
    with pytest.raises(MethodError, match="already"):
        tuned.add("a", pegbox.method("lora", rank=2))
    with pytest.raises(MethodError, match="without dots"):
        tuned.add("a.b", pegbox.method("lora", rank=2))
    with pytest.raises(MethodError, match="no adapter 'b'; one of: a"):
        tuned.use("b")
    tuned.add("b", pegbox.method("lora", rank=2)).remove("a")
    assert list(tuned.adapters) == ["b"]


def test_only_what_is_in_use_trains(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "lora", rank=2, name="a")
    tuned.add("b", pegbox.method("lora", rank=3))
    assert {p.shape[0] for k, p in tuned.trainable().items() if k.endswith(".a")} == {3}
    tuned.use(Stack("a", "b"))
    assert all(k.startswith(("a:", "b:")) for k in tuned.trainable())
    with pytest.raises(MethodError, match="2 adapters are in use"):
        tuned.state()


def test_a_sum_of_two_methods_adds_their_changes(model: nn.Module) -> None:
    base = {n: p.clone() for n, p in model.named_parameters()}
    tuned = shaken(pegbox.tune(model, "lora", rank=2, name="a"), 1)
    shaken(tuned.add("b", pegbox.method("dora", rank=2)), 2)
    tuned.use(Sum(a=0.3, b=0.7))
    want = logits(tuned)
    merged = tuned.merge()
    assert torch.allclose(logits(merged), want, atol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in tuned.model.named_parameters())


def test_a_sum_of_unlike_things_is_refused(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "lora", rank=2, name="a", targets="mlp.down")
    tuned.add("b", pegbox.method("series", bottleneck=2, targets="mlp.down"))
    with pytest.raises(CannotMix, match="use Stack instead"):
        tuned.use(Sum(a=0.5, b=0.5))
    assert tuned.active == ("b",)
    logits(tuned.use(Stack("a", "b")))


def test_full_stays_alone(model: nn.Module) -> None:
    tuned = pegbox.tune(model, "full")
    with pytest.raises(CannotMix, match="shares the model with no other"):
        tuned.add("b", pegbox.method("lora", rank=2))
    with pytest.raises(CannotDisable, match="load the base again"), tuned.disabled():
        pass


def test_a_mistake_changes_nothing(model: nn.Module) -> None:
    want = logits(model)
    for kwargs, error in (
        ({"rank": 4000}, SettingsError),
        ({"targets": "q_porj"}, TargetError),
        ({"rank": "x"}, SettingsError),
        ({"also_train": ("no_head",)}, TargetError),
    ):
        with pytest.raises(error):
            pegbox.tune(model, "lora", **kwargs)
        assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model), want)


def test_rows_must_be_as_many_as_the_batch(model: nn.Module) -> None:
    tuned = shaken(pegbox.tune(model, "lora", rank=2))
    with pytest.raises(CannotMix, match="2 rows were given adapters"), tuned.rows(["default", None]):
        logits(tuned)


def test_a_head_trained_whole_is_saved_merged_and_the_bases_again_when_disabled(tmp_path: Any) -> None:
    model = llama().eval()
    want = logits(model)
    tuned = shaken(pegbox.tune(model, "lora", rank=2, also_train=("head",)))
    changed = logits(tuned)
    assert any(k.startswith("copy.") for k in tuned.trainable())
    with tuned.disabled():
        assert torch.equal(logits(tuned), want)
    tuned.save(tmp_path)
    again = pegbox.load(llama().eval(), tmp_path)
    assert torch.equal(logits(again), changed)
    assert torch.allclose(logits(tuned.merge()), changed, atol=1e-5)


def test_another_base_is_refused(model: nn.Module, tmp_path: Any) -> None:
    pegbox.tune(model, "lora", rank=2).save(tmp_path)
    other = llama(seed=7)
    with pytest.raises(AdapterError, match="another base"):
        pegbox.load(other, tmp_path)
    assert not any("forward" in m.__dict__ for m in other.modules())


def test_a_copy_is_independent(model: nn.Module) -> None:
    tuned = shaken(pegbox.tune(model, "lora", rank=2))
    want = logits(tuned)
    twin = copy.deepcopy(tuned)
    shaken(twin, 5)
    assert torch.equal(logits(tuned), want)
    assert not torch.equal(logits(twin), want)


def test_decay_is_for_matrices_and_rates_for_those_who_ask(model: nn.Module) -> None:
    groups = pegbox.tune(model, "lora+", rank=2).groups(lr=0.01, weight_decay=0.1)
    assert sorted(g["lr"] for g in groups) == pytest.approx([0.01, 0.16])
    dora = pegbox.tune(llama(), "dora", rank=2).groups(lr=0.01, weight_decay=0.1)
    assert {g["weight_decay"] for g in dora} == {0.0, 0.1}


def test_rows_drop_inputs_while_they_train() -> None:
    tuned = shaken(pegbox.tune(llama(), "lora", rank=2, dropout=0.9)).train()
    tuned.model.eval()
    with tuned.rows(["default", None, "default"]):
        first, second = tuned(input_ids=IDS).logits, tuned(input_ids=IDS).logits
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_forward_patched_by_another_library_still_runs(model: nn.Module) -> None:
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    own, calls = layer.forward, []

    def patched(x: Tensor) -> Tensor:
        calls.append(1)
        out: Tensor = own(x)
        return out

    layer.forward = patched
    want = logits(model)
    calls.clear()
    tuned = pegbox.tune(model, "lora", rank=2)
    assert torch.equal(logits(tuned), want)
    assert calls
    tuned.detach()
    assert layer.forward is patched


WRONG: dict[str, tuple[Any, str]] = {
    "a name of a model": (lambda model: pegbox.tune("llama", "lora"), "takes a model"),  # type: ignore[arg-type]
    "settings of another library": (lambda model: pegbox.tune(model, {"r": 4}), "a name or a method"),
    "a second one by name": (lambda model: pegbox.tune(model, "lora", rank=4).add("b", "lora"), "pegbox.method"),
    "a sum of none": (lambda model: pegbox.tune(model, "lora", rank=4).use(Sum()), "names no adapter"),
    "a weight in words": (lambda model: pegbox.tune(model, "lora", rank=4).use(Sum(default="half")), "be a number"),
    "a trainer without an adapter": (lambda model: pegbox.Trainer(model), "takes a tuned model"),
    "a callback without one": (lambda model: pegbox.Callback(model), "takes a tuned model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_says_what_is_right(name: str, model: nn.Module) -> None:
    call, told = WRONG[name]
    with pytest.raises((SettingsError, MethodError), match=told):
        call(model)


def test_the_line_that_users_of_peft_know(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = pegbox.tune(model, "lora", rank=4)
    some, all_ = tuned.count()
    tuned.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {some:,} || all params: {all_:,} ||")
