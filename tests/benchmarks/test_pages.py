"""Pages of experiments keep what was not made anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import effects


def test_sections_that_were_not_made_anew_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "DOCS", tmp_path)
    page, by_hand = tmp_path / "page.md", f"# Page\n\n## By hand\n\nRead.\n\n{effects.MEASURED}\n\n"
    page.write_text(f"{by_hand}## a\n\none\n\n| 1 |\n\n## c\n\nthree\n")
    effects.below("page.md", ["a", "b", "c", "d"], {"b": "two\n", "c": "3"})
    assert page.read_text() == f"{by_hand}## a\n\none\n\n| 1 |\n\n## b\n\ntwo\n\n## c\n\n3\n"
