"""Checkpoints that are whole or not there: written under another name, renamed when complete, checked when read.

`checkpoint-N/` holds the adapter, the optimizer, the scheduler, the generators' states, the trainer's state, and

    pegbox.json     what the run is (see `difference`), how far its log got, and size and CRC-32 of every file
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pegbox.core.errors import SettingsError

PREFIX, UNFINISHED, SEAL = "checkpoint-", ".unfinished", "pegbox.json"

log = logging.getLogger("pegbox")


def staging(output: Path) -> Path:
    """An empty folder in `output` for a checkpoint that is being written; what an interrupted one left is removed."""
    folder = output / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal(folder: Path, output: Path, content: Mapping[str, Any]) -> Path:
    """Note sizes and sums of a finished checkpoint's files, force them to disk, and rename it into `output`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    sums = {str(path.relative_to(folder)): _sum(path) for path in files}
    (folder / SEAL).write_text(json.dumps({**content, "files": sizes, "sums": sums}, indent=1) + "\n")
    for path in (*files, folder / SEAL):
        _to_disk(path)
    final = output / folder.name
    shutil.rmtree(final, ignore_errors=True)  # left by a run that went on from an earlier step
    os.replace(folder, final)
    return final


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_seal(folder: Path) -> dict[str, Any]:
    """`pegbox.json` of a checkpoint.

    Raises:
        SettingsError: no complete checkpoint, and what is wrong with it.
    """
    fault = incomplete(folder)
    if fault:
        raise SettingsError(f"{folder} is no complete checkpoint: {fault}")
    return json.loads((folder / SEAL).read_text())


def incomplete(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint; None if it is one."""
    try:
        sizes = json.loads((folder / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {SEAL}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def damaged(folder: Path) -> str | None:
    """Why a complete checkpoint is not what was written; None if it is. Reads all of it."""
    sums = json.loads((folder / SEAL).read_text()).get("sums", {})
    changed = next((name for name, value in sums.items() if _sum(folder / name) != value), None)
    return None if changed is None else f"{changed} is not what was written"


def _sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders in `output`, by step."""
    found = [(path, re.fullmatch(rf"{PREFIX}(\d+)", path.name)) for path in output.glob(f"{PREFIX}*")]
    numbered = [(int(match[1]), path) for path, match in found if match and path.is_dir()]
    return [path for _, path in sorted(numbered)]


def last_complete(output: Path) -> Path | None:
    """The newest checkpoint that is complete and what was written; others are passed over with a message."""
    for path in reversed(checkpoints(output)):
        fault = incomplete(path) or damaged(path)
        if fault is None:
            return path
        log.warning("%s is passed over, it is no complete checkpoint: %s", path, fault)
    return None


def rotate(output: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    if keep is None or keep < 1:
        return
    for path in checkpoints(output)[:-keep]:
        if best is None or path.resolve() != Path(best).resolve():
            shutil.rmtree(path, ignore_errors=True)


def difference(made: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How the run that made a checkpoint differs from the one that wants to go on from it; None if it does not."""
    plain = json.loads(json.dumps(now, default=str))  # tuples and paths as the file has them
    keys = [key for key in (*made, *plain) if made.get(key) != plain.get(key)]
    return "; ".join(f"{key} was {made.get(key)!r} and is {plain.get(key)!r}" for key in dict.fromkeys(keys)) or None
