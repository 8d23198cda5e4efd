from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from pegbox import methods
from pegbox.evaluate import card
from pegbox.evaluate.export import export

from . import tiny

MANIFEST = {
    "settings": {
        "model": "/home/someone/models/tiny",
        "data": "someone/some-data",
        "learning_rate": 0.001,
        "output": "x",
    },
    "data": {"hash": "abc123", "used": 90},
    "metrics": {"accuracy": 0.75},
    "seed": 42,
    "machine": {"system": "secret"},
}


def exported(
    bases: Path, tmp_path: Path, format: str, manifest: dict[str, Any] | None = None, base: str = "llama"
) -> Path:
    loader = transformers.AutoModelForSequenceClassification if base == "bert" else transformers.AutoModelForCausalLM
    more: dict[str, Any] = {"also_train": ("classifier",)} if base == "bert" else {}
    tiny.tuned(loader.from_pretrained(bases / base), rank=4, **more).save(tmp_path / "adapter")
    if manifest is not None:
        (tmp_path / "adapter" / card.MANIFEST).write_text(json.dumps(manifest))
    return export(tmp_path / "adapter", tmp_path / "out", format).folder


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("format", ["merged", "peft", "adapter"])
def test_the_code_of_the_card_runs(format: str, bases: Path, tmp_path: Path) -> None:
    folder = exported(bases, tmp_path, format)
    front, body = parts(folder)
    assert front["library_name"] == {"merged": "transformers", "peft": "peft", "adapter": "pegbox"}[format]
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a path of this machine is no name
    assert str(bases) not in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names: dict[str, Any] = {}
    code = code.replace("FOLDER", str(folder)).replace('"llama"', repr(str(bases / "llama")))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own
        exec(code, names)
    ids = names["tokenizer"]("Hello", return_tensors="pt")
    assert names["model"](**ids).logits.shape == (1, 5, tiny.VOCABULARY)


def test_what_is_known_is_said_and_nothing_else(bases: Path, tmp_path: Path) -> None:
    front, body = parts(exported(bases, tmp_path, "merged"))
    assert front["tags"] == ["pegbox", "lora"]
    assert not {"datasets", "license", "model-index"} & front.keys()
    assert "its data and its results are not known" in body
    assert "LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685." in body
    assert "y = W x + s B A x" in body
    assert "| rank | `4` |" in body
    assert "| adapter / merged |" in body


def test_a_manifest_beside_the_adapter_is_used(bases: Path, tmp_path: Path) -> None:
    front, body = parts(exported(bases, tmp_path, "merged", MANIFEST, base="bert"))
    assert front["datasets"] == ["someone/some-data"]
    (entry,) = front["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert entry["results"][0]["task"] == {"type": "text-classification"}
    assert "| data.hash | `abc123` |" in body
    assert "| metrics.accuracy | `0.75` |" in body
    assert "| settings.learning_rate | `0.001` |" in body
    assert body.lstrip().startswith("# tiny, tuned with lora")
    assert "secret" not in body
    assert "/home" not in body
    assert "Trained whole beside it: `classifier`." in body


def test_a_hub_base_and_a_licence_are_named(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert card._license(tmp_path / "base") == "mit"
    assert card._license(bases / "llama") is None


def test_every_method_has_a_title_and_an_equation() -> None:
    for name, method in methods.catalogue().items():
        title, equation = card.described(method)
        assert len(title) > 10, name
        assert equation, name


def test_tasks_come_from_the_tables_of_transformers() -> None:
    assert card.task_of(tiny.bert()) == ("text-classification", "AutoModelForSequenceClassification")
    assert card.task_of(tiny.tagger()) == ("token-classification", "AutoModelForTokenClassification")
    assert card.task_of(tiny.t5()) == (None, "AutoModelForSeq2SeqLM")
    assert card.task_of(tiny.vit()) == ("image-classification", "AutoModelForImageClassification")
