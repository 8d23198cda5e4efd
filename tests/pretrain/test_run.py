"""The pipeline as a whole: killed anywhere it ends in the same bits; what is wrong is told, what is done stays."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain.run import pretrain
from pegbox.pretrain.settings import recipe
from pegbox.train.checkpoint import checkpoints
from pegbox.train.trainer import Trainer

from . import small_recipe

MADE = ("model/model.safetensors", "instruct/model.safetensors", "tokenizer/tokenizer.json", "shards/index.json")
MADE += ("corpus/report.json", "corpus/letters.jsonl", "shards/stories-00003.bin", "instruct_data/chosen.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in `whole`, and the same in `broken`, killed at every stage and taken up again."""
    folder = tmp_path_factory.mktemp("root")
    script = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [0, *[signal.SIGKILL] * (len(ended) - 2), 0], done.stderr[-4000:]
    return folder


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """The finished pipeline, to be changed."""
    shutil.copytree(root / "whole", tmp_path / "out")
    return tmp_path / "out"


def run(root: Path, output: Path, **changes: Any) -> Any:
    return pretrain(recipe(small_recipe.values(output, **changes)), root)


def logged(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in steps]


def untrain(output: Path, step: int) -> None:
    """Back to where training had got to a step."""
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["stages"]["train"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    for path in checkpoints(output / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def test_killed_at_every_stage_it_ends_in_the_same_bits(root: Path) -> None:
    for name in MADE:
        assert (root / "whole" / name).read_bytes() == (root / "broken" / name).read_bytes(), name
    assert logged(root / "whole") == logged(root / "broken")
    assert not list((root / "broken").glob(".*"))
    assert json.loads((root / "broken" / "manifest.json").read_text())["status"] == "done"


def test_what_is_done_is_not_done_again(root: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (copied / name).stat().st_mtime_ns for name in MADE}
    run(root, copied, prompts=["A letter to"])
    assert {name: (copied / name).stat().st_mtime_ns for name in MADE} == before
    assert "step" not in capsys.readouterr().out
    assert "**A letter to**" in (copied / "report.md").read_text()


def test_another_instruction_run_leaves_the_base_alone(root: Path, copied: Path) -> None:
    base, tuned = ((copied / name).read_bytes() for name in MADE[:2])
    values = small_recipe.values(copied)
    values["instruct"] |= {"select": "all", "method": "lora"}
    pretrain(recipe(values), root)
    assert (copied / MADE[0]).read_bytes() == base
    assert (copied / MADE[1]).read_bytes() != tuned
    assert json.loads((copied / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_other_settings_of_training_are_refused(root: Path, copied: Path) -> None:
    values = small_recipe.values(copied)
    values["train"]["learning_rate"] = 1e-3
    with pytest.raises(SettingsError, match=r"learning_rate was 0\.01 and is 0\.001"):
        pretrain(recipe(values), root)


# -- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["truncated", "flipped"])
def test_a_corrupted_checkpoint_is_passed_over(
    fault: str, root: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untrain(copied, step=8)
    file = copied / "checkpoints" / "checkpoint-8" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[-500] ^= 1
    file.write_bytes(content if fault == "flipped" else content[:-9])
    (copied / "model" / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "pegbox"):
        run(root, copied)
    assert "checkpoint-8 is passed over, it is no complete checkpoint: optimizer.pt" in caplog.text
    assert (copied / MADE[0]).read_bytes() == (root / "whole" / MADE[0]).read_bytes()


FULL: list[Exception] = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
]


@pytest.mark.parametrize("error", FULL, ids=["system", "torch"])
def test_a_full_disk_leaves_the_last_checkpoint(
    error: Exception, root: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrain(copied, step=6)

    def full(self: Trainer, folder: str) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_rng_state", full)
        with pytest.raises(DataError, match=r"is full; the checkpoint .*checkpoint-6 is intact"):
            run(root, copied)
    assert json.loads((copied / "manifest.json").read_text())["status"] == "failed"
    run(root, copied)
    assert (copied / MADE[0]).read_bytes() == (root / "whole" / MADE[0]).read_bytes()


def an_empty_shard(root: Path, output: Path) -> None:
    (output / "shards" / "stories-00001.bin").write_bytes(b"")


def a_source_that_is_no_text(root: Path, output: Path) -> None:
    (root / "stories.jsonl").write_bytes(bytes(range(256)) * 20)


def no_source(root: Path, output: Path) -> None:
    (root / "letters.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (an_empty_shard, r"stories-00001\.bin is empty"),
        (a_source_that_is_no_text, r"stories"),
        (no_source, r"letters\.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(
    spoil: Callable[[Path, Path], None], named: str, copied: Path, tmp_path: Path
) -> None:
    own = small_recipe.folder(tmp_path / "own")
    spoil(own, copied)
    base = (copied / MADE[0]).read_bytes()
    with pytest.raises(DataError, match=named):
        run(own, copied)
    assert (copied / MADE[0]).read_bytes() == base


def test_a_tokenizer_smaller_than_the_bytes_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tokenizer\.size is 200, below the 256 bytes"):
        run(root, tmp_path / "out", **{"tokenizer.size": 200})


def test_instructions_that_cannot_work_are_refused_before_anything_is_made(root: Path, tmp_path: Path) -> None:
    values = small_recipe.values(tmp_path / "out")
    values["instruct"]["run"] = {"epoch": 3}
    with pytest.raises(SettingsError, match="did you mean 'epochs'"):
        pretrain(recipe(values), root)
    assert not (tmp_path / "out").exists()


# -- the plan ------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_sizes_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, tmp_path / "out", dry_run=True) is None
    said = capsys.readouterr().out
    assert "sources.stories: 'stories 0." in said
    assert "training: 0.0M tokens, 8 steps" in said
    assert "parameters" in said
    assert "64 devices: " in said
    assert not list(tmp_path.iterdir())
