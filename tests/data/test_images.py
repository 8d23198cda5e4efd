from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch

from pegbox.core.errors import DataError
from pegbox.data.check import check
from pegbox.data.encoded import Rejected
from pegbox.data.examples import read, split
from pegbox.data.images import EncodedImage, ImageCollator, encode_images_all, opened


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def folder(at: Path, split_name: str = "") -> Path:
    for name, shades in (("cat", (10, 20, 30)), ("dog", (200, 210))):
        place = at / split_name / name
        place.mkdir(parents=True)
        for shade in shades:
            (place / f"{shade}.png").write_bytes(png(shade))
    return at


def rows_of(source):
    return sorted((Path(row["image"]).name, row["label"]) for row in read(source))


IN_FOLDERS = [("10.png", "cat"), ("20.png", "cat"), ("200.png", "dog"), ("210.png", "dog"), ("30.png", "cat")]


def test_a_folder_a_class(tmp_path):
    found = read(folder(tmp_path))
    assert (found.kind, found.format.name) == ("image", "image classification")
    assert rows_of(tmp_path) == IN_FOLDERS


def test_a_folder_a_split(tmp_path):
    folder(tmp_path, "train")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "9.png").write_bytes(png(9))
    assert rows_of(tmp_path) == IN_FOLDERS
    assert len(read(tmp_path, split="test")) == 1


def test_an_image_in_no_class_s_folder(tmp_path):
    folder(tmp_path)
    (tmp_path / "loose.png").write_bytes(png(1))
    with pytest.raises(DataError, match=r"'loose.png' is in no class's folder; expected .*CLASS/loose.png"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_paths_in_a_table_start_at_the_table(tmp_path, column):
    folder(tmp_path / "pictures")
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({column: "pictures/cat/10.png", "label": "cat"}) + "\n")
    (row,) = read(table)
    assert opened(row["image"]).size == (6, 4)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bytes_in_a_table_of_datasets(tmp_path, kind):
    rows = [{"image": {"bytes": png(shade), "path": None}, "label": shade // 100} for shade in (1, 150)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    found = read(path)
    assert [row["label"] for row in found] == [0, 1]
    assert [opened(row["image"]).getpixel((0, 0))[0] for row in found] == [1, 150]


def test_images_of_a_datasets_object(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [PIL.Image.new("RGB", (4, 4), (shade,) * 3) for shade in (5, 250)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dark", "light"]))
    found = read(datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features))
    assert [row["label"] for row in found] == ["dark", "light"]
    assert opened(found[1]["image"]).getpixel((0, 0)) == (250, 250, 250)


def test_what_cannot_be_read_is_rejected(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"id": "a", "image": png(1), "label": "x"}, {"id": "b", "image": str(tmp_path / "bad.png"), "label": "x"}]
    rows += [{"id": "c", "image": str(tmp_path / "gone.png"), "label": "x"}, {"id": "d", "image": png(1), "label": "y"}]
    used, lost = encode_images_all(rows, ["x"])
    assert used == [EncodedImage(rows[0]["image"], 0, "a")]
    assert [(row.id, row.reason) for row in lost] == [
        ("b", "image cannot be read"),
        ("c", "image cannot be read"),
        ("d", "unknown label"),
    ]
    assert isinstance(lost[0], Rejected)
    assert "gone.png" in lost[1].detail


def processor(images, *, return_tensors):
    assert return_tensors == "pt"
    assert all(image.mode == "RGB" for image in images)
    return {"pixel_values": torch.stack([torch.full((3, 2, 2), image.getpixel((0, 0))[0]) for image in images])}


def test_batches():
    rows = [EncodedImage(png(7), 1, "a"), EncodedImage(png(9), 0, "b")]
    batch = ImageCollator(processor)(rows)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [7, 9]
    assert batch["labels"].tolist() == [1, 0]
    many = ImageCollator(processor)([EncodedImage(png(7), (0.0, 1.0), "a")])
    assert many["labels"].dtype == torch.float32


def test_the_same_image_falls_on_one_side_of_a_split(tmp_path):
    rows = [{"image": png(shade), "label": "x"} for shade in (1, 2, 3, 4, 1, 2, 3, 4)]
    first, second = split(read(rows), 0.5, seed=0)
    assert {row["image"] for row in first}.isdisjoint({row["image"] for row in second})


def test_check(tmp_path):
    folder(tmp_path)
    (tmp_path / "dog" / "copy.png").write_bytes(png(10))
    (tmp_path / "dog" / "bad.png").write_bytes(b"no image")
    found = {finding.name: finding.count for finding in check(read(tmp_path)).findings}
    assert found == {"unreadable-image": 1, "label-conflict": 1}
