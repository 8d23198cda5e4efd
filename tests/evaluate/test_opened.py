from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pegbox.core import files
from pegbox.core.errors import ModelError
from pegbox.evaluate.classify import classify
from pegbox.evaluate.export import export, merge
from pegbox.evaluate.opened import open_adapter, open_model
from pegbox.train.model import load

from . import tiny


def test_the_real_model_of_a_run_is_opened_merged_and_classifies(tmp_path: Path) -> None:
    labels = ["lost card", "limit", "money"]
    loaded = load("minilm", "sequence_classification", labels=labels)
    tuned = tiny.tuned(loaded.model, rank=4, also_train=loaded.new)
    noted = {"objective": "sequence_classification", "labels": labels, "multi_label": False}
    files.save(tuned, tmp_path / "adapter", **noted)
    texts = ["my card is lost", "more money, please"]
    inputs = loaded.tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        shares = tuned(**inputs).logits[0].softmax(-1)
    said = classify(tmp_path / "adapter", texts)
    assert list(said[0].scores) == labels
    assert said[0].scores == pytest.approx(dict(zip(labels, shares.tolist(), strict=True)), abs=1e-5)
    done = merge(tmp_path / "adapter", tmp_path / "merged")
    assert [c.label for c in classify(done.folder, texts)] == [c.label for c in said]
    card = (done.folder / "README.md").read_text()
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "license: apache-2.0" in card
    theirs = export(tmp_path / "adapter", tmp_path / "peft", "peft")
    assert 'load_classifier(locate("model"), num_labels=3)' in (theirs.folder / "README.md").read_text()


def test_the_same_base_is_opened_every_time(bases: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bases / "gpt2", num_labels=3)
    noted = {"objective": "sequence_classification", "labels": ["a", "b", "c"], "multi_label": True}
    files.save(tiny.tuned(model, rank=4, also_train=("score",)), tmp_path / "adapter", **noted)
    state = torch.random.get_rng_state()
    one, other = (open_adapter(tmp_path / "adapter").fresh() for _ in range(2))
    assert torch.equal(one.score.weight, other.score.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.config.problem_type == "multi_label_classification"  # type: ignore[union-attr]


def test_an_adapter_that_peft_wrote_is_opened(bases: Path, tmp_path: Path) -> None:
    import warnings

    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own
        theirs = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[1, 2, 3]])
    opened = open_adapter(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(opened.tuned(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    assert merge(tmp_path / "theirs", tmp_path / "merged").report.passed


def test_a_whole_model_is_opened_by_the_class_it_names(bases: Path, tmp_path: Path) -> None:
    model, tokenizer = open_model(bases / "bert")
    assert type(model) is transformers.BertForSequenceClassification
    assert tokenizer.pad_token_id == 258
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"the model '.*empty' cannot be loaded \(.*there is no config\.json"):
        open_model(tmp_path / "empty")


def test_an_adapter_that_names_no_base_asks_for_it(tmp_path: Path) -> None:
    tiny.tuned(tiny.llama(), rank=4).save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="this adapter does not name its base; pass model="):
        open_adapter(tmp_path / "adapter")
    assert open_adapter(tmp_path / "adapter", model=tiny.llama()).tokenizer is None
