"""Shards: what is on disk is what was packed, and a build that was broken off anywhere ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegbox.core.errors import DataError
from pegbox.pretrain import shards
from pegbox.pretrain.rows import best_fit
from pegbox.pretrain.settings import Recipe, TokenizerSettings, recipe
from pegbox.pretrain.tokenizer import encode, train

from .texts import TinyCorpus, prose


@pytest.fixture(scope="module")
def tokenizer():
    return train(prose(40), TokenizerSettings(size=280))


@pytest.fixture
def corpus(tmp_path: Path) -> TinyCorpus:
    return TinyCorpus(tmp_path, {"prose": prose(70), "code": prose(25, seed=1)})


def settings(output: Path, **changes: Any) -> Recipe:
    plain = {"output": str(output), "sources.prose.path": "p", "sources.code.path": "c"}
    plain |= {"rows.length": 32, "rows.shard": 64, "rows.buffer": 10}
    return recipe({**plain, **changes})


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "shards").iterdir()}


def test_rows_on_disk_are_the_rows_that_were_packed(tmp_path: Path, corpus, tokenizer) -> None:
    made = shards.build(settings(tmp_path / "out"), corpus, tokenizer, print)
    for name in corpus.files:
        ids = [[*row, 1] for row in encode(tokenizer, corpus.texts(name))]
        expected = np.stack(list(best_fit(ids, 32, 0, 10)))
        rows = pickle.loads(pickle.dumps(made.rows(name)))  # as a loader's worker gets them
        assert rows.shape == expected.shape == (made.counts[name], 32)
        assert rows[0].dtype == np.uint16
        np.testing.assert_array_equal(np.stack(list(rows)), expected)
        assert made.sources[name].tokens == sum(map(len, ids)) == int((expected != 0).sum()) + made.sources[name].lost
    assert len(made.sources["prose"].shards) > 2
    with pytest.raises(DataError, match="did you mean 'prose'"):
        made.rows("pros")


def test_a_build_that_breaks_off_at_any_file_goes_on_to_the_same_bytes(
    tmp_path: Path, corpus, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.build(settings(tmp_path / "whole"), corpus, tokenizer, print)
    whole, replace = contents(tmp_path / "whole"), os.replace
    for stop in range(2 * len(whole) + 2):  # each file, the note after it and that at a source's end, the index
        written: list[str] = []

        def breaking(part: Path, path: Path, stop: int = stop, written: list[str] = written) -> None:
            written.append(path.name)
            if len(written) == stop + 1:
                raise KeyboardInterrupt
            replace(part, path)

        output = tmp_path / f"broken{stop}"
        monkeypatch.setattr(os, "replace", breaking)
        with suppress(KeyboardInterrupt):
            shards.build(settings(output), corpus, tokenizer, print)
            assert len(written) == stop, "only the last round is not broken off"
        if len(written) == stop + 1:
            with pytest.raises(DataError, match="no complete shards"):
                shards.load(output / "shards")
        shards.build(settings(output), corpus, tokenizer, print)
        assert contents(output) == whole
        again = Counter(name for name in written if name.endswith(".bin"))
        assert again.total() <= len(again) + 1, "it went on, and did not begin anew"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.pretrain.test_shards import settings
from tests.pretrain.texts import TinyCorpus, prose
from pegbox.pretrain import shards
from transformers import PreTrainedTokenizerFast
folder = Path(sys.argv[1])
def say_nothing(line): pass
def fsync(number, calls=[]):
    calls.append(number)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
corpus = TinyCorpus(folder, {"prose": prose(70), "code": prose(25, seed=1)})
shards.build(settings(folder / "killed"), corpus, PreTrainedTokenizerFast.from_pretrained(folder / "t"), say_nothing)
"""


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, corpus, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert any(name.endswith(".unfinished") for name in contents(tmp_path / "killed"))
    said: list[str] = []
    shards.build(settings(tmp_path / "killed"), corpus, tokenizer, said.append)
    shards.build(settings(tmp_path / "whole"), corpus, tokenizer, print)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert said[0] == "shards: prose goes on after 2 files"


def test_they_are_made_anew_when_what_they_are_made_of_changes(tmp_path: Path, corpus, tokenizer) -> None:
    said: list[str] = []
    build = lambda **changes: shards.build(settings(tmp_path, **changes), corpus, tokenizer, said.append)  # noqa: E731
    first = build()
    assert build(**{"rows.order": "blocks"}) == first
    assert said[-1].endswith("as made before")
    assert build(**{"rows.length": 40}).length == 40
    assert len(build(**{"rows.shard": 16, "rows.packing": "concatenate"}).rows("code")) > 4
    assert not said[-1].endswith("as made before")
    corpus.files["prose"].write_text(corpus.files["code"].read_text())
    fewer = build()
    assert fewer.counts["prose"] == fewer.counts["code"] < first.counts["prose"]
    kept = {shard.file for packed in fewer.sources.values() for shard in packed.shards}
    assert set(contents(tmp_path)) == kept | {"index.json"}


@pytest.mark.parametrize(("left", "told"), [(None, "is missing"), (0, "is empty"), (100, "has 100 bytes of 4096")])
def test_a_damaged_shard_is_told(tmp_path: Path, corpus, tokenizer, left: int | None, told: str) -> None:
    shards.build(settings(tmp_path), corpus, tokenizer, print)
    victim = tmp_path / "shards" / "prose-00001.bin"
    content = victim.read_bytes()
    victim.unlink() if left is None else victim.write_bytes(content[:left])
    with pytest.raises(DataError, match=f"prose-00001.bin {told}; delete .*index.json"):
        shards.build(settings(tmp_path), corpus, tokenizer, print)
    (tmp_path / "shards" / "index.json").unlink()
    shards.build(settings(tmp_path), corpus, tokenizer, print)
    assert victim.read_bytes() == content


def test_a_source_too_small_for_a_row_is_told(tmp_path: Path, tokenizer) -> None:
    corpus = TinyCorpus(tmp_path, {"prose": prose(50), "code": ["a = 1"]})
    with pytest.raises(DataError, match=r"'code' fills no row: 1 texts have \d tokens, a row 32"):
        shards.build(settings(tmp_path), corpus, tokenizer, print)


def test_a_full_disk_leaves_what_was_made_intact(
    tmp_path: Path, corpus, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))

    def full(number: int) -> None:
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left.*2 files of 'prose'.*intact"):
            shards.build(settings(tmp_path / "full"), corpus, tokenizer, print)
    assert not any(name.endswith(".unfinished") for name in contents(tmp_path / "full"))
    shards.build(settings(tmp_path / "full"), corpus, tokenizer, print)
    shards.build(settings(tmp_path / "whole"), corpus, tokenizer, print)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_large_vocabularies_take_four_bytes(tmp_path: Path, corpus, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: (1 << 16) + 1)
    made = shards.build(settings(tmp_path), corpus, tokenizer, print)
    assert made.rows("code")[0].dtype == np.uint32
    assert json.loads((tmp_path / "shards" / "index.json").read_text())["dtype"] == "<u4"
