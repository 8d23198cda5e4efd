"""Every objective that learns from rows of its own, from a file to a trained adapter, by settings alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import (
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import pegbox
from pegbox.core.errors import DataError, SettingsError
from pegbox.train import Trainer, run_settings, train

from . import tiny

PAIRED = ("dpo", "ipo", "orpo", "simpo", "reward")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preferences(path: Path, count: int = 16) -> Path:
    rows = [
        {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no " * (1 + i % 2), "margin": i / 8}
        for i in range(count)
    ]
    return written(path, rows)


def unpaired(path: Path, count: int = 16) -> Path:
    rows = [{"prompt": f"say {i}", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(count)]
    return written(path, rows)


def run(folder: Path, model: Path, data: Path, **changes: Any) -> Any:
    plain = {"model": str(model), "data": str(data), "valid": str(data), "output": str(folder / "out"), "epochs": 4}
    plain |= {"method": "lora", "method.rank": 4, "learning_rate": 1e-2, "batch_size": 4, "dtype": "float32"}
    return train(run_settings(plain | changes))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.model_folder(tmp_path / "llama")


@pytest.mark.parametrize(
    ("objective", "packing"), [*((name, False) for name in PAIRED), *((name, True) for name in PAIRED[:-1])]
)
def test_preferences(tmp_path: Path, llama: Path, objective: str, packing: bool) -> None:
    data = preferences(tmp_path / "pairs.jsonl")
    changes = {} if objective == "dpo" else {"objective": objective}  # what preferences are for, unless one says so
    result = run(tmp_path, llama, data, packing=packing, **changes)
    assert result.objective == objective
    assert result.metrics["reward_accuracy"] > 0.9
    assert result.metrics["reward_margin"] > 0
    assert {"loss", "chosen_reward", "rejected_reward"} <= result.metrics.keys()


def test_unpaired(tmp_path: Path, llama: Path) -> None:
    result = run(tmp_path, llama, unpaired(tmp_path / "u.jsonl"), **{"objective.desirable_weight": 1.5})
    assert result.objective == "kto"
    assert result.metrics["reward_margin"] > 0
    assert result.manifest["settings"]["objective_settings"] == {"desirable_weight": 1.5}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_reference_asked_before_training(tmp_path: Path, llama: Path, method: str, objective: str) -> None:
    """The same training as with the disabled adapter; and the only one that a method which trains the base can have."""
    make = preferences if objective == "dpo" else unpaired
    data = make(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"method": method, "objective.precompute": True, "max_steps": 3, "learning_rate": 1e-3}
    plain = {"model": str(llama), "data": str(data), "valid": str(data), "batch_size": 4, "dtype": "float32"}
    known = train(run_settings(plain | {"output": str(tmp_path / "a")} | options))
    assert known.train_loss is not None
    if method == "lora":
        asked = train(run_settings(plain | {"output": str(tmp_path / "b")} | options | {"objective.precompute": False}))
        assert known.train_loss == pytest.approx(asked.train_loss, abs=1e-5)
        assert known.metrics == pytest.approx(asked.metrics, abs=1e-4)
    else:
        assert known.metrics["reward_margin"] > 0


def test_a_method_that_trains_the_base_is_told_to_precompute(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(SettingsError, match=r"full trains the base's own tensors; set objective.precompute=true"):
        train(
            run_settings(
                {
                    "model": str(llama),
                    "data": str(preferences(tmp_path / "p.jsonl")),
                    "method": "full",
                    "output": str(tmp_path / "o"),
                }
            )
        )


def test_a_reward_model_scores(tmp_path: Path, llama: Path) -> None:
    result = run(tmp_path, llama, preferences(tmp_path / "p.jsonl"), objective="reward")
    assert isinstance(result.tuned.model, LlamaForSequenceClassification)
    assert result.tuned.model.config.num_labels == 1


def test_answers_cut_by_max_length_are_counted(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "x", "chosen": "y", "rejected": "n"}, {"prompt": "x" * 90, "chosen": "y", "rejected": "n"}]
    result = run(tmp_path, llama, written(tmp_path / "p.jsonl", rows), max_length=64, valid=None, max_steps=1)
    assert result.manifest["data"]["used"] == 1
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected["reason"] == "target cut away"


def test_seq2seq(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": tiny.PAD, "eos_token_id": 257, "decoder_start_token_id": tiny.PAD}
    folder = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes, **special)).save_pretrained(folder)
    made = tiny.tokenizer()
    made.chat_template = None
    made.save_pretrained(folder)
    data = written(tmp_path / "d.jsonl", [{"prompt": f"{i}", "completion": "ab" if i % 2 else "cd"} for i in range(16)])
    result = run(tmp_path, folder, data, objective="seq2seq", **{"objective.generate": 4, "label_smoothing": 0.1})
    assert result.objective == "seq2seq"
    assert result.metrics["loss"] == result.metrics["nll"] < math.log(tiny.VOCABULARY)
    assert 0 <= result.metrics["exact_match"] <= result.metrics["rouge_l"] <= 1


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **tiny.SIZES)).save_pretrained(folder)
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def pictures(folder: Path) -> Path:
    """Dark and light squares, in a folder a class."""
    for name, shade in (("dark", 10), ("light", 240)):
        for i in range(6):
            place = folder / "train" / name
            place.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (20, 24), (shade, shade + i, shade)).save(place / f"{i}.png")
    return folder


def test_images(tmp_path: Path, vit: Path) -> None:
    result = run(tmp_path, vit, pictures(tmp_path / "pictures"))
    assert result.objective == "image_classification"
    assert result.labels == ("dark", "light")
    assert result.metrics["accuracy"] == 1.0
    again = pegbox.load(type(result.tuned.model).from_pretrained(vit, num_labels=2), tmp_path / "out")
    assert again.state().keys() == result.tuned.state().keys()


def test_packed_rewards_are_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(SettingsError, match=r"packing is for language modelling \(.*simpo\), not for reward"):
        run(tmp_path, llama, preferences(tmp_path / "p.jsonl"), objective="reward", packing=True)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "make", "message"),
    [
        ("kto", preferences, "fit no known layout|kto learns from unpaired data"),
        ("dpo", unpaired, r"dpo does not fit .*, which holds unpaired data .*; dpo learns from preference data, and"),
        (
            "sft",
            preferences,
            "sft learns from chat or text or tokenised data, and preference data is for dpo, ipo, orpo",
        ),
        ("seq2seq", preferences, "seq2seq learns from chat data"),
        ("image_classification", preferences, "image_classification learns from image data"),
    ],
)
def test_data_of_another_kind(tmp_path: Path, llama: Path, objective: str, make: Any, message: str) -> None:
    with pytest.raises((SettingsError, DataError), match=message):
        run(tmp_path, llama, make(tmp_path / "d.jsonl"), objective=objective)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "dpo", "objective.bta": 0.1}, "objective dpo has no setting 'bta'; did you mean 'beta'"),
        ({"objective": "kto", "objective.beta": -1}, "objective kto.beta must be above 0"),
        ({"objective": "dop"}, "unknown objective 'dop'; did you mean 'dpo'"),
        ({"objective": {"name": "simpo", "gama": 1}}, "objective simpo has no setting 'gama'"),
        ({"objective": "sft", "beta": 0.1}, "run has no setting 'beta'"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run_settings(values)


def test_settings_by_other_tools_names() -> None:
    made = run_settings({"rlhf_type": "simpo", "beta": 2.5, "simpo_gamma": 0.5, "rank": 8})
    assert (made.objective, made.objective_settings) == ("simpo", {"beta": 2.5, "gamma": 0.5})
    assert made.method_settings == {"rank": 8}
    assert run_settings({"objective": {"name": "dpo", "loss": "hinge"}}).objective_settings == {"loss": "hinge"}


def test_the_trainer_takes_settings_and_a_reference(tmp_path: Path) -> None:
    from pegbox.data.collate import PairCollator
    from pegbox.data.encoded import EncodedPair

    rows = [EncodedPair(a, b, a.id) for a, b in zip(tiny.rows(8), tiny.rows(8, seed=1), strict=True)]
    tuned = pegbox.tune(tiny.llama(), "full")
    trainer = Trainer(
        tuned,
        "dpo",
        tiny.arguments(tmp_path, max_steps=2),
        objective_options={"beta": 0.3, "reference": tiny.llama()},
        train_dataset=rows,
        data_collator=PairCollator(tiny.PAD),
    )
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.identity()["objective.beta"] == 0.3
    with pytest.raises(SettingsError, match="objective kto has no setting 'label_smoothing'"):
        Trainer(tuned, "kto", tiny.arguments(tmp_path, label_smoothing_factor=0.1))
