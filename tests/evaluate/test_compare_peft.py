"""A comparison of a method of Pegbox's with one of HF PEFT's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pegbox.evaluate.compare import compare
from pegbox.evaluate.compare_settings import compare_settings
from pegbox.evaluate.opened import open_adapter


def test_lora_and_pefts_vera(bases: Path, tmp_path: Path) -> None:
    made = [
        {"text": word * 3 + str(k), "label": said} for k in range(16) for said, word in (("bad", "z"), ("good", "a"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    values: dict[str, Any] = {"model": str(bases / "bert"), "data": str(tmp_path / "rows.jsonl")}
    values |= {"test": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")}
    values |= {"methods": ["lora", "peft:vera"], "lora.rank": 2, "peft:vera.r": 4}
    values |= {"trials": 1, "seeds": 1, "max_steps": 2, "valid_share": 0.25, "max_length": 32}
    done = compare(compare_settings(values))
    lora, vera = done.entries[:2]
    assert (lora.name, vera.name) == ("lora", "peft:vera")
    assert vera.trained < lora.trained
    assert "peft:vera" in (tmp_path / "out" / "table.md").read_text()
    assert open_adapter(tmp_path / "out" / "winner").file.method == done.winner
