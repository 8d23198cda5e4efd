"""Every Python block of the README and the docs runs; every command line in them parses; generated pages are fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def surroundings() -> dict[str, Any]:
    """What the examples take as given: a model, batches, rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes))
    ids = torch.randint(60, (3, 8))
    batch = {"input_ids": ids, "labels": ids}
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    sides = torch.randint(60, (4, 8))
    answers = {"input_ids": sides, "labels": sides.masked_fill(torch.arange(8) < 3, -100)}
    more = {"tokenizer": _letters(), "pairs": _pairs(), "preferences": answers}
    return more | {
        "torch": torch,
        "model": model,
        "batches": [batch] * 2,
        "batch": batch,
        "three_rows": batch,
        "rows": rows,
    }


def _letters() -> Any:
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {letter: k for k, letter in enumerate(("<pad>", "</s>", "?", *"abcdefghijklmnopqrstuvwxyz "))}
    inner = Tokenizer(models.WordLevel(known, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="?")


def _pairs() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"say {x}", "chosen": " yes", "rejected": " no"} for x in "abcd"])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # between trl and transformers
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    for number, block in enumerate(blocks(page, "python")):
        if block.startswith('"""'):  # a whole file
            file = tmp_path / f"block_{number}.py"
            file.write_text(block)
            import pegbox

            names["tuned"] = pegbox.tune(names["model"], pegbox.method(str(file)))
            continue
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)  # the docs are our own


def command_lines() -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.splitlines():
                command = line.partition("#")[0].strip()
                if command:
                    yield pytest.param(command, id=f"{page.name}: {command[:40]}")


@pytest.mark.parametrize("command", list(command_lines()))
def test_command_lines_parse(command: str) -> None:
    """Verbs exist, settings are known; what a command does is tested where the verb is."""
    from pegbox.cli.lint import check_command

    make = re.fullmatch(r"make (\w+)", command)
    if make:
        assert f"\n{make[1]}:" in (ROOT / "Makefile").read_text()
    elif match := re.search(r"pegbox (.*)$", command):
        check_command(match[1].split())
    else:
        assert command.startswith(("pip install", "python docs/generate.py"))


def test_generated_pages_are_fresh() -> None:
    result = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
