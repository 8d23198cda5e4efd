"""Images with labels: found in folders and tables, checked, and made into batches by a model's own processor.

An image in a row is a path, the bytes of a file, `{"bytes": ..., "path": ...}` as `datasets` writes it, or a Pillow
image.  It is read when its batch
is made, so that a data set of any size trains from the disk.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pegbox.core.errors import DataError, MissingExtra, did_you_mean
from pegbox.data.encoded import Label, Rejected, apart
from pegbox.data.rejects import RowError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
COLUMNS = ("image", "img", "file_name", "image_path")  # where tables keep an image
Example = Mapping[str, Any]


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in SUFFIXES


def looks_like(value: Any) -> bool:
    """Whether a value of a row may be an image."""
    if isinstance(value, Mapping):
        return value.keys() <= {"bytes", "path"} and any(value.values())
    return isinstance(value, bytes) or _is_decoded(value) or (isinstance(value, str) and is_image(Path(value)))


def _is_decoded(value: Any) -> bool:
    """Whether a value is a Pillow image, as `datasets` gives them; where there is one, Pillow is loaded."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def located(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row of a table whose images are paths: those that are relative start at the table's folder."""
    found = {c: folder / row[c] for c in COLUMNS if isinstance(row.get(c), str) and is_image(Path(row[c]))}
    return dict(row) | {column: str(path) for column, path in found.items() if path.is_file()}


def canonical(value: Any) -> str | bytes:
    """A path, or the bytes of an image file.

    Raises:
        RowError: neither is there.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if _is_decoded(value):
        file = io.BytesIO()
        value.convert("RGB").save(file, "PNG")
        value = file.getvalue()
    if not isinstance(value, (str, bytes)) or not value:
        raise RowError("image is missing", f"found {type(value).__name__}")
    return value


def content(image: str | bytes) -> bytes:
    """The bytes of an image file.

    Raises:
        RowError: there is no such file.
    """
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).expanduser().read_bytes()
    except OSError as error:
        raise RowError("image cannot be read", f"{image}: {error.strerror or error}") from None


def mark(image: str | bytes) -> str:
    """Sixteen hexadecimal digits of an image's content; of its path, where there is no such file."""
    try:
        data = content(image)
    except RowError:
        data = str(image).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def opened(image: str | bytes) -> Image:
    """An image in red, green and blue.

    Raises:
        RowError: no such file, or not an image.  MissingExtra: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtra("pillow", "images", "reading images") from error
    try:
        with PIL.Image.open(io.BytesIO(content(image))) as found:
            return found.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        where = image if isinstance(image, str) else f"{len(image)} bytes"
        raise RowError("image cannot be read", f"{where}: {error}") from None


# -- rows and batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image and its class number, or (C,) multi-label 0/1 vector."""

    image: str | bytes
    label: Label
    id: str

    def __len__(self) -> int:
        return 1  # all images of a model are of one size


def encode_images_all(examples: Iterable[Example], labels: Sequence[str]) -> tuple[list[EncodedImage], list[Rejected]]:
    """Images that can be read, with their class numbers.

    Args:
        labels: the class names in order; a row's label is one of them, else a class number, or a list of either.
    """
    numbers = {name: i for i, name in enumerate(labels)}
    return apart(_encoded(example, numbers) for example in examples)


def _encoded(example: Example, numbers: Mapping[str, int]) -> EncodedImage | Rejected:
    try:
        opened(example["image"])
        return EncodedImage(example["image"], _label(example["label"], numbers), example["id"])
    except RowError as fault:
        return Rejected(example["id"], fault.reason, fault.detail)


def _label(label: Any, numbers: Mapping[str, int]) -> Label:
    if isinstance(label, (list, tuple)):
        on = {_class(item, numbers) for item in label}
        return tuple(float(i in on) for i in range(len(numbers)))
    return _class(label, numbers)


def _class(name: Any, numbers: Mapping[str, int]) -> int:
    number = numbers.get(str(name))
    if number is None:
        raise RowError("unknown label", f"{name!r}{did_you_mean(str(name), numbers)}")
    return number


class Processor(Protocol):
    """A model's image processor: images to `pixel_values` (B, 3, H, W)."""

    def __call__(self, images: Sequence[Any], *, return_tensors: str) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class ImageCollator:
    """`pixel_values` (B, 3, H, W), as the model's own processor makes them, and `labels`: (B,) class numbers, or
    (B, C) float32 of several labels an image."""

    processor: Processor

    def __call__(self, rows: Sequence[EncodedImage]) -> dict[str, Tensor]:
        import torch

        whole = all(isinstance(row.label, int) for row in rows)
        try:
            images = [opened(row.image) for row in rows]
        except RowError as gone:
            raise DataError(f"an image that was there when the run began: {gone}") from gone
        return {
            "pixel_values": self.processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([row.label for row in rows], dtype=torch.long if whole else torch.float32),
        }
