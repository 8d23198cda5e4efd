"""A base in a few bits, from the command line: trained over, opened again, merged onto the plain base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evaluate import tiny
from pegbox.core import storage
from train.tiny import chat_file

from .conftest import Ran

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
FORMATS = {"nf4": "nf4", "int8": "int8", "int4": "torchao int4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("data") / "chat.jsonl")


Train = Callable[..., Ran]


@pytest.fixture
def train(base: Path, data: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> Train:
    def run(*words: str) -> Ran:
        plain = (f"model={base}", f"data={data}", f"output={tmp_path / 'out'}", "max_steps=3", "learning_rate=0.02")
        return pegbox("train", *plain, *words)

    return run


def logits(folder: Path) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not storage.quantised_parameters(model)
    with torch.no_grad():
        return model(torch.tensor([[72, 101, 108, 108, 111]])).logits


def test_nf4_is_trained_over_and_merged_onto_the_plain_base(
    base: Path, data: Path, train: Train, tmp_path: Path, pegbox: Callable[..., Ran]
) -> None:
    ran = train("load_in_4bit=true")
    assert ran.code == 0, ran
    assert "base       14 matrices kept as nf4" in ran.out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["quantise"] == "nf4"

    exact = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'exact'}")
    assert exact.code == 0, exact
    assert "equal to what was trained" in exact.out
    assert "kept as" not in exact.err

    onto = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'plain'}", "quantise=none")
    assert onto.code == 0, onto
    assert "how far from what was trained is told below" in onto.out
    assert "here it is kept as plain numbers, and 14 of its matrices are off by" in onto.out
    report = json.loads((tmp_path / "plain" / "parity.json").read_text())
    (moved,) = report["moved"]
    assert 0.05 < moved["mean"] <= moved["largest"] == moved["matrices"][moved["worst"]] < 0.2
    assert moved["what"] in (tmp_path / "plain" / "README.md").read_text()
    start, one, other = logits(base), logits(tmp_path / "exact"), logits(tmp_path / "plain")
    assert 0 < (one - other).norm() < (one - start).norm()

    for verb, words in {
        "eval": [f"data={data}", "limit=4"],
        "generate": ["prompt=say 1", "max_new_tokens=2"],
        "inspect": [],
    }.items():
        assert pegbox(verb, f"adapter={tmp_path / 'out'}", *words).code == 0


@pytest.mark.parametrize("quantise", FORMATS)
def test_a_merged_model_may_stay_quantised(
    quantise: str, train: Train, tmp_path: Path, pegbox: Callable[..., Ran]
) -> None:
    assert train(f"quantise={quantise}").code == 0
    ran = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'merged'}", "requantise=true")
    assert ran.code == 0, ran
    assert "Keeping the 14 merged matrices quantised has moved them by" in ran.out
    assert "what the adapter had changed of them" in ran.out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Keeping the 14 merged matrices quantised has moved them by" in card
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(storage.quantised_parameters(again).values()) == {FORMATS[quantise]}


def test_compare_trains_over_a_quantised_base(base: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    rows = [{"text": f"{'good' if k % 2 else 'bad'} {k}", "label": "yn"[k % 2]} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"model={base}", f"data={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out'}"]
    brief = ["trials=1", "trial_steps=1", "max_steps=1", "seeds=1", "quantise=nf4"]
    ran = pegbox("compare", *given, *brief, "methods=lora,dora")
    assert ran.code == 0, ran
    ran = pegbox("compare", *given, *brief, "methods=lora,full", "overwrite=true")
    assert ran.code == 2
    assert "full trains the base's own tensors" in ran.err


# -- what cannot be done ----------------------------------------------------------------------------------------------


def told(ran: Ran, words: str) -> None:
    assert ran.code == 2, ran
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in ran.err


def test_without_the_library(
    train: Train, tmp_path: Path, pegbox: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("quantise=nf4").code == 0
    found = storage.importlib.util.find_spec
    monkeypatch.setattr(
        storage.importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    needs = "needs bitsandbytes, which is not installed: pip install 'pegbox[quantised]'"
    told(train("quantise=nf4", f"output={tmp_path / 'other'}"), f"quantise=nf4 {needs}")
    given = ["merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'merged'}"]
    told(pegbox(*given), f"kept as nf4 (quantise=none loads it plain), {needs}")
    onto = pegbox(*given, "quantise=none")
    assert onto.code == 0, onto
    assert "as a few values of each tell" in onto.out


@pytest.mark.parametrize(("quantise", "width"), [("nf4", 96), ("int4", 72)])
def test_what_does_not_fill_its_blocks_stays_plain(quantise: str, width: int, train: Train, tmp_path: Path) -> None:
    """bitsandbytes decodes it wrongly on a CPU, torchao refuses it."""
    tiny.llama(hidden_size=64, intermediate_size=width).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    ran = train(f"quantise={quantise}", f"model={tmp_path / 'base'}")
    assert ran.code == 0, ran
    assert f"base       12 matrices kept as {quantise}" in ran.out


def test_a_linear_layer_kept_turned_is_merged_into_its_own_class(
    data: Path, train: Train, tmp_path: Path, pegbox: Callable[..., Ran]
) -> None:
    """GPT-2's Conv1D keeps (in, out), bitsandbytes (out, in)."""
    config = transformers.GPT2Config(vocab_size=264, n_embd=64, n_layer=1, n_head=2, n_positions=128)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 256, 257, 258
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    assert train("quantise=int8", f"model={tmp_path / 'base'}").code == 0
    for kept in ("auto", "none"):
        ran = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / kept}", f"quantise={kept}")
        assert ran.code == 0, ran
        logits(tmp_path / kept)


def test_a_model_without_a_linear_layer(data: Path, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification, MobileNetV1ImageProcessorPil

    config = MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=2)
    MobileNetV1ForImageClassification(config).save_pretrained(tmp_path / "base")
    MobileNetV1ImageProcessorPil().save_pretrained(tmp_path / "base")
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (32, 32), (k, 0, 0)).save(tmp_path / "images" / label / f"{k}.png")
    given = [f"model={tmp_path / 'base'}", f"data={tmp_path / 'images'}", f"output={tmp_path / 'out'}", "quantise=nf4"]
    told(pegbox("train", *given), "has no linear layer to keep as nf4; leave quantise=nf4 out")


def test_a_base_that_is_quantised_already(
    base: Path, data: Path, tmp_path: Path, train: Train, pegbox: Callable[..., Ran]
) -> None:
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=four)
    model.save_pretrained(tmp_path / "stored")
    tiny.tokenizer().save_pretrained(tmp_path / "stored")
    told(train(f"model={tmp_path / 'stored'}", "quantise=nf4"), "are quantised already, by bitsandbytes")
    assert train(f"model={tmp_path / 'stored'}").code == 0
    merged = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'merged'}")
    assert merged.code == 0, merged


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise=fp4"], "must be one of 'none', 'nf4', 'int8', 'int4', got 'fp4'"),
        (["bits=3"], "bits must be one of 4, 8, 16, 32, got 3"),
        (["quantise=nf4", "load_in_8bit=true"], "quantise is given twice, as 'load_in_8bit' too"),
        (["quantise=nf4", "method=full"], "full trains the base's own tensors"),
    ],
)
def test_mistakes(words: list[str], message: str, train: Train) -> None:
    told(train(*words), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to page to")
def test_paged_states_need_a_gpu(train: Train) -> None:
    told(train("optim=paged_adamw_32bit"), "there is no GPU here; optimizer=adamw_torch_fused")


@pytest.mark.parametrize("words", [["requantise=true"], ["requantise=true", "dtype=bfloat16"]])
def test_nothing_to_requantise(words: list[str], train: Train, tmp_path: Path, pegbox: Callable[..., Ran]) -> None:
    assert train().code == 0
    ran = pegbox("merge", f"adapter={tmp_path / 'out'}", f"output={tmp_path / 'merged'}", *words)
    told(ran, "requantise")
    assert not (tmp_path / "merged").exists()
