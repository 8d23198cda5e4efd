from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pegbox
from pegbox import methods
from pegbox.core import Tuned
from pegbox.core.errors import AdapterError, CannotMerge, MethodError, ModelError, ParityError, SettingsError
from pegbox.core.settings import build
from pegbox.evaluate import export as export_module
from pegbox.evaluate import parity, saved
from pegbox.evaluate.export import ExportSettings, export, merge

from . import tiny

Adapter = Callable[..., Path]


@pytest.fixture
def adapter(bases: Path, tmp_path: Path) -> Adapter:
    """Tune a saved base and save the adapter."""

    def make(method: str = "lora", base: str = "llama", **settings: Any) -> Path:
        loader = (
            transformers.AutoModelForSequenceClassification if base == "bert" else transformers.AutoModelForCausalLM
        )
        model = loader.from_pretrained(bases / base, dtype="auto")
        if method in ("lora", "dora", "miss", "bat"):
            settings = {"rank": 4} | settings
        folder = tmp_path / f"{base}-{method}"
        tiny.tuned(model, method, **settings).save(folder)
        return folder

    return make


IDS = torch.tensor([[72, 101, 108, 108, 111]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def tuned_logits(bases: Path, folder: Path, base: str = "llama") -> Tensor:
    return logits(pegbox.load(transformers.AutoModelForCausalLM.from_pretrained(bases / base), folder))


# -- merged ------------------------------------------------------------------------------------------------------


def test_a_merged_export_is_a_whole_model_with_its_papers(bases: Path, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter()
    done = merge(folder, tmp_path / "out")
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    torch.testing.assert_close(logits(model), tuned_logits(bases, folder), rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer.chat_template == tiny.CHAT
    report = json.loads((done.folder / "parity.json").read_text())
    assert report["passed"]
    assert [p["other"] for p in report["pairs"]] == ["adapter", "merged", "reloaded", "reloaded"]
    assert len(report["pairs"][1]["sites"]) == 14
    assert "merged in" in str(done)
    assert "| adapter / merged |" in str(done)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "bat", "bitfit", "full"])
@pytest.mark.parametrize("base", ["gpt2", "bert"])
def test_every_mergeable_method_is_exported(method: str, base: str, adapter: Adapter, tmp_path: Path) -> None:
    more = {"also_train": ("classifier",)} if base == "bert" and method != "full" else {}
    done = merge(adapter(method, base, **more), tmp_path / "out")
    assert done.report.passed
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel" if base == "gpt2" else "BertForSequenceClassification"]
    if base == "bert":
        assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}


def test_a_tied_head_is_merged_alone_and_stays_untied(bases: Path, adapter: Adapter, tmp_path: Path) -> None:
    done = merge(adapter("lora", "tied", targets=("all-linear", "lm_head")), tmp_path / "out")
    assert done.report.dtype == "bfloat16"
    assert json.loads((done.folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases / "tied")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_head_that_was_not_tuned_stays_tied(adapter: Adapter, tmp_path: Path) -> None:
    done = merge(adapter("lora", "tied"), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(done.folder / "model.safetensors")


def test_a_merged_model_in_another_dtype(adapter: Adapter, tmp_path: Path) -> None:
    done = merge(adapter(), tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in load_file(done.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_module_at_hand_is_given_back_as_it_was(bases: Path, adapter: Adapter, tmp_path: Path) -> None:
    for method in ("lora", "full"):
        folder = adapter(method)
        model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        merge(folder, tmp_path / method, model=model)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert "forward" not in model.model.layers[0].self_attn.q_proj.__dict__
        assert all(p.requires_grad for p in model.parameters())


def test_held_out_rows_are_probes_too(adapter: Adapter, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "one row"}\n{"text": "another row"}\n')
    done = merge(adapter(), tmp_path / "out", data=str(data))
    assert [d.probe for d in done.report.pairs[0].probes][:3] == ["row 1", "row 2", "text: English"]


def test_settings_as_the_command_line_gives_them(adapter: Adapter, tmp_path: Path) -> None:
    given = {"adapter": str(adapter()), "output": str(tmp_path / "out"), "tolerance": "0.001", "overwrite": "true"}
    assert export(build(ExportSettings, given)).report.pairs[-1].tolerance == 0.001


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "bat", "prompt_tuning"])
def test_an_export_for_peft_is_run_by_peft(method: str, bases: Path, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter(method)
    done = export(folder, tmp_path / "out", "peft")
    assert [(p.reference, p.other) for p in done.report.pairs] == [("base", "adapter"), ("adapter", "PEFT")]
    assert done.report.pairs[0].relative > 0.01
    assert torch.equal(tuned_logits(bases, done.folder), tuned_logits(bases, folder))


def test_an_export_for_peft_with_a_head_of_its_own(adapter: Adapter, tmp_path: Path) -> None:
    assert export(adapter("lora", "bert", also_train=("classifier",)), tmp_path / "out", "peft").report.passed


@pytest.mark.parametrize("method", ["lora", "series", "prompt_tuning", "full"])
def test_an_adapter_is_exported_as_it_is(method: str, bases: Path, adapter: Adapter, tmp_path: Path) -> None:
    folder = adapter(method)
    done = export(folder, tmp_path / "out", "adapter")
    assert done.report.pairs[-1].largest == 0
    assert torch.equal(tuned_logits(bases, done.folder), tuned_logits(bases, folder))


def test_what_the_run_noted_is_kept(bases: Path, tmp_path: Path) -> None:
    from pegbox.core import files

    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    files.save(tiny.tuned(model, rank=4), tmp_path / "adapter", objective="sft")
    done = export(tmp_path / "adapter", tmp_path / "out", "adapter")
    assert files.read(done.folder, methods.catalogue().values()).extra == {"objective": "sft"}


def test_a_wrong_file_for_peft_is_caught(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = export_module.files.save

    def save(tuned: Tuned, folder: Path, **extra: Any) -> Path:
        right(tuned, folder, **extra)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
        return folder

    folder = adapter()
    monkeypatch.setattr(export_module.files, "save", save)
    with pytest.raises(ParityError, match="PEFT differs from adapter"):
        export(folder, tmp_path / "out", "peft")


# -- what cannot be done -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "can"), [("series", "format=adapter"), ("prompt_tuning", "format=adapter or format=peft")]
)
def test_what_has_no_merged_form_says_what_can_be_done(method: str, can: str, adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(
        CannotMerge, match=f"{method} changes more than weights, so it has no merged form; {can} exports"
    ):
        merge(adapter(method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_peft_does_not_have_says_so(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="HF PEFT has no series; format=adapter exports it"):
        export(adapter("series"), tmp_path / "out", "peft")
    with pytest.raises(MethodError, match="HF PEFT has no full; format=merged or format=adapter exports it"):
        export(adapter("full"), tmp_path / "out2", "peft")


def test_a_full_folder_is_not_written_over(adapter: Adapter, tmp_path: Path) -> None:
    folder, out = adapter(), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"out' is not empty; choose another folder, or overwrite=true"):
        merge(folder, out)
    assert (out / "notes.txt").read_text() == "mine"
    merge(folder, out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "notes.txt").exists()
    with pytest.raises(SettingsError, match="holds the adapter itself"):
        merge(folder, folder, overwrite=True)
    with pytest.raises(SettingsError, match="is a file; it must be a folder"):
        merge(folder, out / "README.md")
    with pytest.raises(SettingsError, match="export needs adapter="):
        merge("", out)


def test_a_base_that_is_not_there_is_named(adapter: Adapter, bases: Path, tmp_path: Path) -> None:
    folder = adapter()
    with pytest.raises(ModelError, match=r"the base '.*nowhere' of adapter '.*' cannot be loaded .*; pass model="):
        merge(folder, tmp_path / "out", model=str(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match="trained on another base"):
        merge(folder, tmp_path / "out", model=tiny.llama(seed=3))
    with pytest.raises(AdapterError, match="holds no adapter"):
        merge(bases / "llama", tmp_path / "out")


# -- failing -----------------------------------------------------------------------------------------------------


def test_a_failed_export_leaves_nothing_and_says_how_to_see_it(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = adapter(base="gpt2"), tmp_path / "out"
    monkeypatch.setattr(parity, "save", _broken)
    with pytest.raises(
        ParityError, match=r"in 1 tensors: transformer\.ln_f\.weight.*was not written; keep_failed=true"
    ):
        merge(folder, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2-lora"]
    with pytest.raises(ParityError, match=r"what failed is in .*out\.failed") as caught:
        merge(folder, out, keep_failed=True)
    assert (tmp_path / "out.failed" / "model.safetensors").is_file()
    assert caught.value.report.pairs  # type: ignore[attr-defined]
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(ParityError):
        merge(folder, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["old"]  # what was there is there still


def _broken(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    saved.save(model, folder, dtype)
    tensors = load_file(folder / saved.TENSORS_FILE)
    tensors["transformer.ln_f.weight"] += 0.5
    save_file(tensors, folder / saved.TENSORS_FILE, metadata={"format": "pt"})


def test_an_interrupted_export_leaves_nothing(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = adapter()
    monkeypatch.setattr(export_module.card, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-lora"]


def test_a_tokenizer_that_changes_on_the_way_is_caught(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, right = adapter(), transformers.PreTrainedTokenizerFast.save_pretrained

    def save(self: Any, target: Path, **more: Any) -> Any:
        out = right(self, target, **more)
        told = json.loads((target / "tokenizer.json").read_text())
        vocabulary = told["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (target / "tokenizer.json").write_text(json.dumps(told))
        return out

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)
    with pytest.raises(ParityError, match="the saved tokenizer reads the English probe as"):
        merge(folder, tmp_path / "out")
