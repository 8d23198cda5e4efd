"""Classifiers over the mean of the tokens: their equation, their files, and the methods on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, DistilBertConfig, DistilBertModel

import pegbox
from pegbox import anatomy
from pegbox.core import Tuned
from pegbox.train.pooled import load_classifier, mean_pooled, on_encoder, pools_by_mean

SAYS_MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(params=["bert", "distilbert"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    if request.param == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model = BertModel(BertConfig(vocab_size=20, **sizes))
    else:
        model = DistilBertModel(DistilBertConfig(vocab_size=20, dim=32, n_layers=2, n_heads=2, hidden_dim=48))
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(SAYS_MEAN))
    return folder


@pytest.mark.parametrize(
    ("said", "mean"),
    [
        (SAYS_MEAN, True),
        (SAYS_MEAN | {"pooling_mode_cls_token": True}, False),
        (SAYS_MEAN | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, True),
        ({"pooling_mode": "cls"}, False),
    ],
)
def test_what_the_files_say(said: dict[str, object], mean: bool, tmp_path: Path) -> None:
    assert not pools_by_mean(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert pools_by_mean(tmp_path) is mean


def test_padding_counts_for_nothing(encoder: Path) -> None:
    model = load_classifier(encoder, num_labels=3).eval()
    both = model(input_ids=IDS, attention_mask=MASK).logits
    alone = model(input_ids=IDS[1:, :2]).logits
    torch.testing.assert_close(both[1:], alone)
    hidden = torch.randn(2, 4, 5)
    torch.testing.assert_close(mean_pooled(hidden, MASK)[1], hidden[1, :2].mean(0))


def test_files_give_the_same_model(encoder: Path, tmp_path: Path) -> None:
    model = on_encoder(encoder, num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}).eval()
    want = model(input_ids=IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(input_ids=IDS, attention_mask=MASK).logits, want)
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    assert not pools_by_mean(tmp_path / "saved")


def test_loads_without_pegbox(encoder: Path, tmp_path: Path) -> None:
    on_encoder(encoder, num_labels=2).save_pretrained(tmp_path / "saved")
    code = f"""
import sys
sys.modules["pegbox"] = None
from transformers import AutoModelForSequenceClassification as Auto
print(type(Auto.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)).__name__)
"""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, check=False)
    assert ran.stdout.strip() == "MeanPooledForSequenceClassification", ran.stderr


@pytest.mark.parametrize("method", ["lora", "miss", "bitfit", "full"])
def test_methods_tune_it(method: str, encoder: Path, tmp_path: Path) -> None:
    model = on_encoder(encoder, num_labels=2)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])}
    own = {"rank": 4} if method in ("lora", "miss") else {}
    tuned: Tuned = pegbox.tune(model, method, also_train=() if method == "full" else ("classifier",), **own)
    optimizer = torch.optim.AdamW(tuned.groups(1e-2))
    tuned.eval()
    first = tuned(**batch).loss
    first.backward()
    optimizer.step()
    assert tuned(**batch).loss < first
    tuned.save(tmp_path / "adapter")
    want = tuned(**batch).logits
    loaded = pegbox.load(on_encoder(encoder, num_labels=2), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).logits, want)
    if method != "full":
        torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_its_roles_are_found(encoder: Path) -> None:
    found = anatomy.of(on_encoder(encoder, num_labels=2))
    assert len(found.blocks) == 2
    assert found.head == "classifier"
    assert len(found.resolve("attn.q")) == 2
