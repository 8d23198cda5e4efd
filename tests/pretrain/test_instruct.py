from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain.instruct import Instructed, instruct, settings_of
from pegbox.pretrain.settings import Recipe, recipe

from . import small_base

RUN = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "dtype": "float32"}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "id"}) + "\n" for row in rows))
    return path.name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and instructions in two layouts; the second file repeats two of the first and one of its own."""
    folder = tmp_path_factory.mktemp("root")
    small_base.model().save_pretrained(folder / "base")
    small_base.tokenizer().save_pretrained(folder / "base")
    rows = small_base.chats(20)
    lines(folder / "chats.jsonl", rows)
    single = [row["messages"] for row in rows if len(row["messages"]) == 2]
    asked = [{"instruction": ask["content"], "output": reply["content"]} for ask, reply in single[:2]]
    asked += [{"instruction": f"Name {k}", "output": f"It is {k}."} for k in range(10)]
    lines(folder / "asked.jsonl", [*asked, {"instruction": "NAME  1", "output": "it is 1."}, {"instruction": "?"}])
    return folder


def made(root: Path, output: Path, said: list[str], **changes: Any) -> Instructed:
    return instruct(given(output, **changes), root / "base", root, said.append)


def given(output: Path, **changes: Any) -> Recipe:
    plain = {"data": ["chats.jsonl", "asked.jsonl"], "run": RUN}
    return recipe({"output": str(output), "rows.length": 64, "instruct": plain | changes})


def test_any_method_ends_in_an_ordinary_model_that_talks(root: Path, tmp_path: Path) -> None:
    done = made(root, tmp_path, [], method="lora", method_settings={"rank": 2})
    model = AutoModelForCausalLM.from_pretrained(done.model)
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.chat_template == small_base.CHAT
    changed = load_file(done.model / "model.safetensors")
    base = load_file(root / "base" / "model.safetensors")
    assert any(not torch.equal(changed[key], base[key]) for key in base)
    assert (done.adapter / "adapter_config.json").is_file()
    assert json.loads((done.model / "parity.json").read_text())["passed"]


def test_rows_are_counted_to_the_last(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = made(root, tmp_path, said, select="band")
    for part in done.parts.values():
        assert part.read == part.rejected + part.repeated + part.unscored + part.left + part.kept
    asked, chats = done.parts["asked"], done.parts["chats"]
    assert (asked.read, asked.rejected, asked.repeated) == (14, 1, 3)
    assert asked.kept + chats.kept == 15  # half of the thirty that are left
    kept = [json.loads(line) for line in (tmp_path / "instruct_data" / "chosen.jsonl").read_text().splitlines()]
    assert len(kept) == 15
    scored = [json.loads(line) for line in (tmp_path / "instruct_data" / "entropies.jsonl").read_text().splitlines()]
    values = sorted(line["entropy"] for line in scored)
    assert sorted(line["entropy"] for line in scored if line["kept"]) == values[8:23]
    assert f"instruct: asked: kept {asked.kept} of 14 (1 rejected, 3 repeated" in " ".join(said)


def test_a_band_within_each_source(root: Path, tmp_path: Path) -> None:
    done = made(root, tmp_path, [], select="lowest", share=0.5, per_source=True)
    assert [done.parts[name].kept for name in ("chats", "asked")] == [10, 5]


def test_a_base_tuned_in_full(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = made(root, tmp_path, said)
    assert done.steps == 3
    assert done.parts["chats"].kept == 20
    again = made(root, tmp_path, said)  # goes on from the last checkpoint, or starts again: the same bits
    ours, theirs = (load_file(d.model / "model.safetensors") for d in (done, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"data": "x"}}, "instruct.run.data is settled by the stage itself"),
        ({"run": {"epoch": 1}}, "did you mean 'epochs'"),
        ({"method": "prefix_tuning"}, "changes more than weights"),
        ({"method": "lorra"}, "did you mean 'lora'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=named):
        settings_of(given(tmp_path, **changes), tmp_path)


def test_texts_are_no_instructions(root: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time.\n")
    with pytest.raises(DataError, match="expected conversations or instructions"):
        instruct(given(tmp_path / "out", data="book.txt"), root / "base", tmp_path, print)


def test_two_files_of_one_name_are_told_apart_or_refused(root: Path, tmp_path: Path) -> None:
    from pegbox.pretrain.instruct import sources

    assert list(sources(given(tmp_path, data=["a/x.jsonl", "b/x.jsonl"]).instruct, root)) == ["x", "b/x"]
    with pytest.raises(SettingsError, match="two sources 'b/x'"):
        sources(given(tmp_path, data=["a/x.jsonl", "b/x.jsonl", "b/x.csv"]).instruct, root)
