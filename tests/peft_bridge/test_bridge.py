"""Every tuner of the installed PEFT: it does what the public suite asks, and equals PEFT's own, gradients too."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import pegbox
from pegbox import checks, methods, peft_bridge
from pegbox.checks import Case, Trial
from pegbox.checks.lab import Lab, bits, every, require_close, require_different, require_same_bits, shake
from pegbox.checks.models import FAMILIES
from pegbox.core.errors import AdapterError, CannotMerge, SettingsError, TargetError
from pegbox.core.files import TENSORS
from pegbox.core.tuned import Tuned
from pegbox.peft_bridge.kinds import REFUSED, facts

from .__main__ import RECORD

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
TUNERS = [name.removeprefix("peft:") for name in peft_bridge.names()]
FAMILIES_HERE = ("llama", "bert")
REFUSED_ON = (("beft", "llama"), ("adaption_prompt", "bert"))
PAIRS = [(t, f) for t in TUNERS for f in FAMILIES_HERE if (t, f) not in REFUSED_ON]
FINISHED = {t for t in TUNERS if facts(t).how in ("prompt", "prefix")}  # PEFT cannot train these further from a file
# PEFT gives BERT no prefix, and a prompt only together with a trained head
BESIDE = [(t, f) for t, f in PAIRS if f != "bert" or facts(t).how not in ("prefix", "prompt")]
FIRST = list({t: (t, f) for t, f in reversed(PAIRS)}.values())  # one family each
# one of each way of reaching a tuner; `make peft` runs the whole suite on all
REPRESENTATIVE = ("vera", "adaption_prompt", "prompt_tuning", "prefix_tuning")
SUITE = (
    "starts_as_declared", "size_is_its_formula", "same_seed_same_bits", "global_generator_is_left_alone",
    "gradients_reach_what_trains", "training_lowers_the_loss", "detach_gives_the_base_back", "merged_equals_forward",
    "unmerge_restores_bits", "merging_is_refused", "a_file_holds_all", "each_of_two_is_itself",
)  # fmt: skip
SCALED = {"lora": {"r": 2}, "trainable_tokens": {"token_indices": (1, 5)}}
STORED = ("starts_as_declared", "gradients_reach_what_trains", "merged_equals_forward", "masters_stay_float32")
QUANTISED = ("vera", "osf", "oft", "glora", "poly")  # without, and with, the base's weights in their equation


def _trials(tuners: Sequence[str], families: Sequence[str], only: Sequence[str]) -> list[Trial]:
    cases = [Case(f"peft:{tuner}", families=families) for tuner in tuners]
    return [trial for case in cases for trial in checks.plan(case, only) if trial.reason is None]


TRIALS = [
    *_trials(REPRESENTATIVE, ("llama",), SUITE),
    *_trials(QUANTISED, ("nf4", "int8"), STORED),
    *_trials(("lora", "loha"), ("conv",), ("starts_as_declared", "merged_equals_forward", "a_sum_adds_changes")),
    *_trials(("adalora",), ("llama",), ("merged_equals_forward_in_bf16", "masters_stay_float32")),
]


@pytest.mark.parametrize("trial", TRIALS, ids=[f"{t.method.name()[5:]}-{t.name}" for t in TRIALS])
def test_does_what_the_suite_asks(trial: Trial) -> None:
    result = checks.attempt(trial)
    assert not result.bad, f"{result.status}: {result.message}\n{result.about}"


def test_the_record_of_the_whole_suite_is_of_every_tuner() -> None:
    """`make peft` wrote it, and nothing in it is other than declared."""
    record = json.loads(RECORD.read_text())["tuners"]
    assert sorted(record) == sorted(peft_bridge.names())
    assert not {name: tuner["bad"] for name, tuner in record.items() if tuner["bad"]}


def test_every_type_is_reached_or_refused_with_a_reason() -> None:
    every_type = {kind.value.lower() for kind in PeftType}
    assert set(TUNERS) | set(REFUSED) == every_type
    assert not set(TUNERS) & set(REFUSED)
    for name in REFUSED:
        with pytest.raises(SettingsError, match="is not reached from here"):
            methods.get(f"peft:{name}")


@pytest.mark.parametrize(("tuner", "family"), REFUSED_ON)
def test_what_cannot_be_is_refused(tuner: str, family: str, tmp_path: Path) -> None:
    """And the model is as it was."""
    lab = _lab(tuner, family, tmp_path)
    model = lab.model()
    before = bits(model)
    with pytest.raises((TargetError, SettingsError)):
        lab.tuned(model)
    require_same_bits(bits(model), before, "after a refusal")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("tuner", "family"), BESIDE)
def test_peft_loads_ours(tuner: str, family: str, tmp_path: Path) -> None:
    """PEFT's own model gives the same outputs with our file, and the same gradients of all that it trains."""
    lab = _lab(tuner, family, tmp_path)
    tuned = lab.shaken()
    folder = lab.save(tuned)
    with _quiet():
        theirs = PeftModel.from_pretrained(lab.model(), str(folder), is_trainable=tuner not in FINISHED).eval()
    require_close(_output(lab, theirs), lab.output(tuned), "the adapter in PEFT")
    if tuner in FINISHED:
        return
    # without a task PEFT calls the base past the tuner that adds a penalty
    penalty = tuned.penalty() if theirs.peft_config["default"].task_type else 0.0
    (lab.loss(tuned) + penalty).backward()
    with _quiet():
        lab.family.loss(_Called(theirs)).backward()
    _as_values(tuned.trainable().values())
    _as_values(p for p in theirs.parameters() if p.requires_grad)
    with _quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    have, want = load_file(lab.save(tuned) / TENSORS), load_file(tmp_path / "theirs" / TENSORS)
    assert have.keys() <= want.keys()  # PEFT's file of a classifier has its head as well
    every(have, {key: want[key] for key in have}, require_close, "gradients")


@pytest.mark.parametrize(("tuner", "family"), BESIDE)
def test_pefts_files_load(tuner: str, family: str, tmp_path: Path) -> None:
    """An adapter that PEFT has made and saved gives its outputs here, whatever is known of how it was made."""
    lab = _lab(tuner, family, tmp_path)
    theirs = _made_by_peft(lab)
    with _quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    want = _output(lab, theirs)
    require_different(want, lab.output(lab.model()), "PEFT's adapter")
    tuned = pegbox.load(lab.model(), tmp_path / "theirs")
    require_close(lab.output(tuned), want, "PEFT's adapter here")


@pytest.mark.parametrize(("tuner", "family"), [(t, f) for t, f in FIRST if facts(t).merges])
def test_merges_as_peft_merges(tuner: str, family: str, tmp_path: Path) -> None:
    lab = _lab(tuner, family, tmp_path)
    tuned = lab.shaken()
    folder = lab.save(tuned)
    with _quiet():
        theirs = PeftModel.from_pretrained(lab.model(), str(folder)).eval().merge_and_unload()
    want = {name: p.detach() for name, p in theirs.named_parameters()}
    have = {name: p.detach() for name, p in tuned.merge().named_parameters()}
    every(have, want, require_close, "merged")


@pytest.mark.parametrize("tuner", [t for t in TUNERS if not facts(t).merges])
def test_refuses_to_merge_what_has_no_weight(tuner: str, tmp_path: Path) -> None:
    lab = _lab(tuner, "llama", tmp_path)
    with pytest.raises(CannotMerge):
        lab.tuned().merge()


def test_a_bank_is_kept_once() -> None:
    tuned = _tuned("vera", "llama")
    shared = [key for key in tuned.state() if "vera_A" in key]
    assert shared == ["shared.vera_A.default"]


@pytest.mark.parametrize("tuner", ["lora", "trainable_tokens"])
@pytest.mark.parametrize("known", [True, False])
def test_an_embedding_that_scales_its_rows(tuner: str, known: bool) -> None:
    """As Gemma's, which says by how much, or one that does not: the change is scaled as the rows are, merged or not."""
    from pegbox.checks.kinds import Lookups

    model = Lookups()
    if known:
        model.scaled.embed_scale = 4.0
    tuned = shake(pegbox.tune(model, f"peft:{tuner}", **(SCALED[tuner] | {"targets": "scaled"})).eval())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        change = tuned.model.scaled(ids) - 4 * model.scaled.weight
        want = tuned(ids=ids)
        before = model.scaled.weight.clone()
        require_close(4 * (tuned.merge().scaled.weight - before)[None], change, "the merged table")
        require_close(tuned(ids=ids), want, "the merged model")


def test_pvera_draws_while_it_trains_alone() -> None:
    tuned, batch = shake(_tuned("pvera", "llama")), FAMILIES["llama"].batch(0)
    with torch.no_grad():
        calm = [tuned.eval()(**batch).logits for _ in range(2)]
        drawn = [tuned.train()(**batch).logits for _ in range(2)]
    assert torch.equal(*calm)
    require_different(*drawn, "a second draw")


def test_settings_are_those_of_peft() -> None:
    method = methods.make("peft:vera", {"rank": 8, "dropout": 0.1, "d_initial": 0.2, "target_modules": "q_proj"})
    assert (method.r, method.vera_dropout, method.d_initial, method.targets) == (8, 0.1, 0.2, "q_proj")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("peft:verra", {}, "did you mean 'peft:vera'"),
        ("peft:vera", {"d_inital": 1}, "did you mean 'd_initial'"),
        ("peft:vera", {"r": "many"}, "must be a whole number"),
        ("peft:vera", {"bias": "all"}, "must be none"),
        ("peft:lora", {"init_lora_weights": "pissa"}, "must be"),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        methods.make(name, settings)


def test_what_peft_refuses_is_refused_in_its_words() -> None:
    with pytest.raises((SettingsError, TargetError), match="peft:oft: HF PEFT refuses"):
        pegbox.tune(_model("llama"), "peft:oft", oft_block_size=7)


def test_a_setting_of_a_newer_peft(tmp_path: Path) -> None:
    lab = _lab("vera", "llama", tmp_path)
    with _quiet():
        _made_by_peft(lab).save_pretrained(str(tmp_path / "theirs"))
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r":', '"use_wonders": true, "r":'))
    with pytest.raises(AdapterError, match="use_wonders"):
        pegbox.load(lab.model(), tmp_path / "theirs")


# -- PEFT beside ------------------------------------------------------------------------------------------------------

EXTRA = {"multitask_prompt_tuning": {"task_ids"}, "poly": {"task_ids"}}


class _Called(nn.Module):
    """PEFT's model, with what only it must be told."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs
        self.tuner = theirs.peft_config["default"].peft_type.value.lower()

    def forward(self, **inputs: Tensor) -> Any:
        if "task_ids" in EXTRA.get(self.tuner, ()):
            rows = len(next(iter(inputs.values())))
            told = self.theirs if self.theirs.peft_config["default"].task_type else self.theirs.base_model
            return told(**inputs, task_ids=torch.zeros(rows, dtype=torch.long))
        return self.theirs(**inputs)


def _lab(tuner: str, family: str, folder: Path) -> Lab:
    method = Case(f"peft:{tuner}", families=(family,)).built()
    return Lab(method, FAMILIES[family], folder)


def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].build().eval()


def _tuned(tuner: str, family: str) -> Tuned:
    return _lab(tuner, family, Path()).tuned()


@torch.no_grad()
def _output(lab: Lab, theirs: nn.Module) -> Tensor:
    """PEFT's outputs; it leaves those of a prompt's tokens in."""
    with _quiet():
        out: Tensor = _Called(theirs)(**lab.inputs()).logits
    rows = lab.output(lab.model()).shape
    return out[:, -rows[1] :] if out.ndim == 3 else out


def _made_by_peft(lab: Lab) -> Any:
    """PEFT's model with random values, of the configuration that ours writes."""
    from peft import PeftConfig

    folder = lab.save(lab.tuned(), folder="template")
    with _quiet():
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        theirs = get_peft_model(lab.model(), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs


@torch.no_grad()
def _as_values(parameters: Any) -> None:
    """Every gradient in the place of its parameter, so that saving writes gradients by the file's keys."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.copy_(parameter.grad)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT's advice left out; its warnings about keys are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in (".*missing.*key.*", ".*[Uu]nexpected.*", ".*does not match.*"):
            warnings.filterwarnings("error", message=words)
        yield
