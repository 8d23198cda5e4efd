"""LLaMA-Factory's registry `dataset_info.json`: each entry a file or hub id, and what its columns and tags are called.

Layout as documented in that project's data/README.md: `file_name` or `hf_hub_url`, `formatting`, `columns`, `tags`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.core.errors import DataError, did_you_mean

NAME = "dataset_info.json"
# The registry's word for a column -> the column's usual name in that layout.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
ROLES = {  # the registry's tag -> the ShareGPT role it stands for
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Entry:
    """One entry: where its rows are, and how they are renamed."""

    source: str | Path
    columns: dict[str, str]  # column in the file -> usual name
    role_tag: str = "from"
    content_tag: str = "value"
    roles: dict[str, str] | None = None  # role in the file -> ShareGPT role
    split: str | None = None
    limit: int | None = None

    def rewrite(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under the usual names of columns, turn keys and roles."""
        renamed = {self.columns.get(column, column): value for column, value in row.items()}
        return {column: self._turns(value) for column, value in renamed.items()}

    def _turns(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._turns(item) for item in value]
        if not isinstance(value, Mapping) or self.role_tag not in value or self.content_tag not in value:
            return value
        rest = {key: item for key, item in value.items() if key not in (self.role_tag, self.content_tag)}
        role = value[self.role_tag]
        return {"from": (self.roles or {}).get(role, role), "value": value[self.content_tag], **rest}


def entries(path: Path) -> dict[str, Any]:
    """The entries of a registry file; empty where the file is another thing of the same name.

    `datasets` writes a `dataset_info.json` too, into every folder it saves.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as problem:
        raise DataError(f"{path}: not JSON: {problem}") from problem
    found = content if isinstance(content, dict) else {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict) and _place(entry)}


def entry(path: Path, name: str | None) -> Entry:
    """The entry `name` of a registry file, or its only one.

    Raises:
        DataError: no entry of that name, or several and none named.
    """
    known = entries(path)
    if name is None and len(known) == 1:
        name = next(iter(known))
    if name is None:
        raise DataError(f"{path}: name one of its sets, as '{path}:NAME'{did_you_mean('', known)}")
    if name not in known:
        raise DataError(f"{path}: no set {name!r}{did_you_mean(name, known)}")
    return _entry(path.parent, known[name])


def _place(entry: Mapping[str, Any]) -> str | None:
    return entry.get("file_name") or entry.get("hf_hub_url")


def _entry(folder: Path, found: Mapping[str, Any]) -> Entry:
    usual = ALPACA if found.get("formatting", "alpaca") == "alpaca" else SHAREGPT
    tags = found.get("tags") or {}
    return Entry(
        source=folder / found["file_name"] if found.get("file_name") else _hub(found),
        columns={column: usual.get(word, word) for word, column in (found.get("columns") or {}).items() if column},
        role_tag=tags.get("role_tag", "from"),
        content_tag=tags.get("content_tag", "value"),
        roles={tags[tag]: role for tag, role in ROLES.items() if tag in tags},
        split=found.get("split") if not found.get("file_name") else None,
        limit=found.get("num_samples"),
    )


def _hub(found: Mapping[str, Any]) -> str:
    subset = found.get("subset")
    return f"{found['hf_hub_url']}:{subset}" if subset else str(found["hf_hub_url"])
