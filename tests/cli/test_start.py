"""Starting costs nothing: no heavy package is imported before a command needs it."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors", "pydantic")
HELP = """
import json, sys, time
from pegbox.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps([time.process_time(), [name for name in {heavy} if name in sys.modules]]), file=sys.stderr)
"""
IMPORT = """
import json, sys, time
start = time.process_time()
import pegbox
print(json.dumps([time.process_time() - start, [name for name in {heavy} if name in sys.modules]]), file=sys.stderr)
"""


def started(code: str) -> tuple[float, list[str], str]:
    """CPU seconds, heavy modules imported, and what was printed."""
    ran = subprocess.run([sys.executable, "-c", code.format(heavy=HEAVY)], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(ran.stderr.splitlines()[-1])
    return seconds, modules, ran.stdout


def test_help_imports_nothing_heavy() -> None:
    seconds, modules, out = started(HELP)
    assert modules == []
    assert seconds < 0.3
    assert "demo" in out
    assert "compare" in out


def test_import_imports_nothing_heavy() -> None:
    seconds, modules, _ = started(IMPORT)
    assert modules == []
    assert seconds < 0.2


def test_a_mistake_is_one_line_without_a_traceback() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pegbox", "train", "modle=x"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert "did you mean 'model'" in ran.stderr
