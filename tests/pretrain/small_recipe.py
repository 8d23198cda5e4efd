"""A whole pipeline of seconds: forty texts, a model of two blocks, eight steps, a few instructions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from . import small_base

SENTENCE = "the sea was calm and the old captain looked at the ship before he went down to his cabin to write"


def folder(root: Path) -> Path:
    """Two sources, a held-out one, and instructions."""
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("stories", 40), ("letters", 20), ("kept_apart", 4)):
        rows = [{"text": f"{name} {k}. " + _text(draw)} for k in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"messages": row["messages"]} for row in small_base.chats(12)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return root


def _text(draw: random.Random) -> str:
    sentences = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(6, 14))).capitalize() + "." for _ in range(12)]
    return " ".join(sentences)


def values(output: Path, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "sources": {
            "stories": {"path": "stories.jsonl", "weight": 2, "licence": "public domain"},
            "letters": {"path": "letters.jsonl", "licence": "MIT"},
        },
        "held_out": {"apart": "kept_apart.jsonl"},
        "clean.quality": False,
        "duplicates.near": None,
        "duplicates.held_out": None,
        "tokenizer.size": 300,
        "rows": {"length": 64, "shard": 50},
        "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2},
        "train": {"steps": 8, "batch": 4, "learning_rate": 1e-2, "save_steps": 2, "eval_steps": 4, "logging_steps": 1},
        "instruct": {"data": "chats.jsonl", "select": "band"},
        "prompts": ["The sea was"],
    }
    plain["train"]["dtype"] = "float32"
    plain["instruct"]["run"] = {"max_steps": 3, "batch_size": 4, "dtype": "float32", "save_steps": 1}
    return plain | changes
