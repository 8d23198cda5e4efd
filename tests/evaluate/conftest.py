from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from . import tiny


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved bases with their tokenizers: llama, tied (bfloat16), gpt2, bert."""
    folder = tmp_path_factory.mktemp("bases")
    made = {"llama": tiny.llama(), "gpt2": tiny.gpt2(), "bert": tiny.bert()}
    made["tied"] = tiny.llama(tied=True).to(torch.bfloat16)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tiny.tokenizer(chat=name == "llama").save_pretrained(folder / name)
    return folder
