from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pegbox
from pegbox.core import LowRankGraft, Tuned
from pegbox.core import tuned as tuned_module
from pegbox.core.errors import CannotMerge, ParityError
from pegbox.core.low_rank import as_matrix
from pegbox.core.site import ModuleSite
from pegbox.evaluate import parity, saved
from pegbox.evaluate.parity import Probe, compare, gate

from . import tiny

Make = Callable[[], nn.Module]
MODELS: dict[str, tuple[Make, dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "tied": (lambda: tiny.llama(tied=True), {}),
    "tied, head": (lambda: tiny.llama(tied=True), {"targets": ("all-linear", "lm_head")}),
    "gpt2": (tiny.gpt2, {}),
    "bert": (tiny.bert, {"also_train": ("classifier",)}),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "miss": {"rank": 8},
    "bat": {"rank": 8},
    "bitfit": {"targets": ".*"},
    "full": {"targets": ".*"},
}
CASES = [(m, k) for m in MODELS for k in METHODS if not (k == "bitfit" and m in ("llama", "tied", "tied, head"))]


def made(model: str, method: str, dtype: torch.dtype) -> Tuned:
    make, where = MODELS[model]
    settings = where | METHODS[method]
    if method == "full":
        settings.pop("also_train", None)
    return tiny.tuned(make().to(dtype), method, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model", "method"), CASES)
def test_a_right_merge_passes(model: str, method: str, dtype: torch.dtype) -> None:
    tuned = made(model, method, dtype)
    before = {name: p.clone() for name, p in tuned.model.named_parameters(remove_duplicate=False)}
    tie = getattr(tuned.model.config, "tie_word_embeddings", None)
    report = gate(tuned)
    judged = [(p.reference, p.other) for p in report.pairs if p.tolerance is not None]
    assert judged == [("adapter", "merged"), ("adapter", "reloaded"), ("merged", "reloaded")]
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert all(p.relative < p.tolerance / 2 for p in report.pairs if p.tolerance)  # the tolerances have room
    if method != "full":
        assert (report.pairs[0].reference, report.pairs[0].other) == ("base", "adapter")
        assert report.pairs[0].relative > 0.1  # what a wrong merge would get wrong
    # the tuned model is as it was
    after = dict(tuned.model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert getattr(tuned.model.config, "tie_word_embeddings", None) == tie


# -- planted mistakes --------------------------------------------------------------------------------------------


def scale_forgotten(patch: pytest.MonkeyPatch) -> None:
    def weight(self: LowRankGraft, w: Tensor) -> Tensor:
        down, up, _ = self.factors()
        return w + up @ as_matrix(down, w.shape[1], up)

    patch.setattr(LowRankGraft, "weight", weight)


def sign_turned(patch: pytest.MonkeyPatch) -> None:
    right = LowRankGraft.weight
    patch.setattr(LowRankGraft, "weight", lambda self, w: 2 * w - right(self, w))


def delta_transposed(patch: pytest.MonkeyPatch) -> None:
    right = LowRankGraft.weight

    def weight(self: LowRankGraft, w: Tensor) -> Tensor:
        delta = right(self, w) - w
        return w + (delta.T if delta.shape[0] == delta.shape[1] else delta)

    patch.setattr(LowRankGraft, "weight", weight)


def layer_skipped(patch: pytest.MonkeyPatch) -> None:
    right = Tuned.merge

    def merge(self: Tuned, **how: Any) -> nn.Module:
        model = right(self, **how)
        owner, leaf, kept = next(iter(self._unmerged.values()))  # type: ignore[union-attr]
        setattr(owner, leaf, kept)
        return model

    patch.setattr(Tuned, "merge", merge)


def other_adapter(patch: pytest.MonkeyPatch) -> None:
    right = Tuned.merge

    def merge(self: Tuned, **how: Any) -> nn.Module:
        self.add("other", pegbox.methods.make("lora", {"rank": 4}))
        tiny.moved(self, seed=9)
        return right(self, **how)

    patch.setattr(Tuned, "merge", merge)


def merged_twice(patch: pytest.MonkeyPatch) -> None:
    right = LowRankGraft.weight
    patch.setattr(LowRankGraft, "weight", lambda self, w: right(self, right(self, w)))


MISTAKES = [scale_forgotten, sign_turned, delta_transposed, layer_skipped, other_adapter, merged_twice]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_merge_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tiny.tuned(tiny.llama().to(dtype), rank=4, by=0.01)
    mistake(monkeypatch)
    with pytest.raises(
        ParityError, match=r"merged differs from adapter: largest difference \S+, \S+ of the largest out"
    ):
        gate(tuned)


def test_the_module_that_was_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny.tuned(tiny.llama().to(torch.bfloat16), rank=4, by=0.01)
    layer_skipped(monkeypatch)
    with pytest.raises(
        ParityError, match=r"1 of 14 modules differ by themselves, most model\.layers\.0\.self_attn\.q_proj"
    ):
        gate(tuned)


def test_a_detour_through_bfloat16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny.tuned(tiny.llama(), rank=4)
    right = ModuleSite.stored
    monkeypatch.setattr(ModuleSite, "stored", lambda self, name, value, *_: right(self, name, value.bfloat16()))
    with pytest.raises(ParityError, match="merged differs from adapter"):
        gate(tuned)


def test_a_conv1d_weight_stored_the_wrong_way_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny.tuned(tiny.gpt2(), rank=4, targets=("attn.c_proj",))
    monkeypatch.setattr(ModuleSite, "stored", lambda self, name, value, *_: value.to(torch.float32).contiguous())
    with pytest.raises(ParityError, match="merged differs from adapter"):
        gate(tuned)


def test_a_head_that_is_not_merged_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny.tuned(tiny.bert(), rank=4, also_train=("classifier",))
    right = tuned_module._merged
    monkeypatch.setattr(tuned_module, "_merged", lambda site: right(site) if site.path != "classifier" else [])
    with pytest.raises(ParityError, match="merged differs from adapter"):
        gate(tuned)


def test_a_head_merged_into_the_tied_embedding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(self: Tuned, site: ModuleSite, dotted: str, value: Tensor) -> None:
        kept = getattr(site.module, dotted)
        self._unmerged[f"{site.path}.{dotted}"] = (site.module, dotted, nn.Parameter(kept.detach().clone()))  # type: ignore[index]
        kept.data.copy_(value)

    tuned = tiny.tuned(tiny.llama(tied=True), rank=4, targets=("lm_head",))
    monkeypatch.setattr(Tuned, "_swap", swap)
    with pytest.raises(ParityError, match="merged differs from adapter"):
        gate(tuned)


def _broken_file(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., None]:
    def save(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
        saved.save(model, folder, dtype)
        tensors = load_file(folder / saved.TENSORS_FILE)
        change(tensors)
        save_file(tensors, folder / saved.TENSORS_FILE, metadata={"format": "pt"})

    return save


def test_a_file_that_lacks_a_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(parity, "save", _broken_file(lambda tensors: tensors.pop(name)))
    with pytest.raises(ParityError, match=f"reloaded has other values than merged in 1 tensors: {name}"):
        gate(tiny.tuned(tiny.llama(), rank=4))


def test_a_file_with_one_wrong_number_is_caught_though_no_probe_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][263, 0] += 1  # an id that no text has

    monkeypatch.setattr(parity, "save", _broken_file(change))
    with pytest.raises(ParityError, match=r"in 1 tensors: model\.embed_tokens\.weight") as caught:
        gate(tiny.tuned(tiny.llama(), rank=4), tokenizer=tiny.tokenizer())
    assert caught.value.report.pairs[-1].largest == 0  # type: ignore[attr-defined]


# -- the rest of the gate ----------------------------------------------------------------------------------------


def test_a_method_without_a_merged_form_says_so_and_nothing_changes() -> None:
    tuned = tiny.tuned(tiny.llama(), "series", bottleneck=4)
    with pytest.raises(CannotMerge, match="SeriesGraft at"):
        gate(tuned)
    assert tuned.active == ("default",)


def test_a_module_outside_transformers_is_gated_on_given_probes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    tuned = tiny.tuned(model, rank=2, targets=r"\d+", by=0.1)
    probes = [Probe("noise", {"input": torch.randn(4, 8)})]
    report = gate(tuned, probes)
    assert report.passed
    assert report.pairs[0].relative > 0.1
    assert report.pairs[-1].probes[0].positions == 4


def test_an_adapter_too_small_to_judge_is_said_to_be() -> None:
    report = gate(pegbox.tune(tiny.llama(), rank=4))
    assert report.passed
    assert "a wrong merge of it could not be told from a right one" in report.notes[0]
    assert report.notes[0] in report.markdown()


def test_saving_in_another_dtype_is_judged_by_the_coarser() -> None:
    report = gate(tiny.tuned(tiny.llama(), rank=4), dtype=torch.bfloat16)
    assert report.dtype == "bfloat16"
    assert report.pairs[1].relative < 1e-5 < report.pairs[2].relative < 0.01
    with pytest.raises(ParityError, match="reloaded differs from adapter"):
        gate(tiny.tuned(tiny.llama(), rank=4), dtype=torch.bfloat16, tolerance=1e-5)


def test_training_mode_and_dropout_are_as_before() -> None:
    tuned = tiny.tuned(tiny.llama(attention_dropout=0.5), rank=4, dropout=0.5).train()
    assert gate(tuned).passed
    assert all(module.training for module in tuned.modules())


def test_outputs_that_are_no_logits_have_no_kl() -> None:
    from transformers import BertModel

    encoder = BertModel(tiny.bert().config).eval()
    report = gate(tiny.tuned(encoder, rank=4))
    assert report.passed
    assert report.pairs[-1].mean_kl is None
    assert "| - | - | - | - |" in report.markdown()


# -- compare -----------------------------------------------------------------------------------------------------


def _fixed(values: list[list[float]]) -> Callable[[Probe], Tensor]:
    return lambda probe: torch.tensor(values)


PROBES = [Probe("p", {})]


def test_the_numbers_are_those_of_the_definition() -> None:
    report = compare(_fixed([[1.0, 2.0], [4.0, 0.0]]), _fixed([[2.0, 1.0], [4.0, 0.0]]), PROBES, 0.1)
    (pair,) = report.pairs
    p = math.exp(2) / (math.exp(1) + math.exp(2))
    kl = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    assert (pair.largest, pair.relative, pair.top1) == (1.0, 0.25, 0.5)
    assert pair.max_kl == pytest.approx(kl)
    assert pair.mean_kl == pytest.approx(kl / 2)
    assert not report.passed
    with pytest.raises(
        ParityError, match=r"largest difference 1, 0\.25 of the largest output \(at most 0\.1 allowed\)"
    ):
        report.require()


def test_infinities_that_agree_differ_by_nothing_and_nan_fails() -> None:
    masked = [[1.0, -math.inf, 2.0]]
    assert compare(_fixed(masked), _fixed(masked), PROBES, 1e-6).require().pairs[0].mean_kl == 0
    assert not compare(_fixed([[1.0, 2.0]]), _fixed([[1.0, math.nan]]), PROBES, 1e9).passed
    with pytest.raises(ParityError, match=r"gives outputs \(1, 2\), the other \(1, 3\)"):
        compare(_fixed([[1.0, 2.0]]), _fixed(masked), PROBES, 1.0)


def test_padding_is_left_out() -> None:
    probe = Probe("padded", {"attention_mask": torch.tensor([[1, 0]])})
    one, other = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 2.0], [9.0, 9.0]]])
    report = compare(lambda _: one, lambda _: other, [probe], 1e-6)
    assert report.passed
    assert report.pairs[0].probes[0].positions == 1


def test_a_report_is_plain_values() -> None:
    import json

    report = compare(_fixed([[1.0, 2.0]]), _fixed([[1.0, 2.0]]), PROBES, 0.1)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["passed"]
    assert read["pairs"][0]["probes"][0]["probe"] == "p"
