"""Pictures for the zoo: the labelled sets beside the project, how they are split, and how far two sets are apart.

set                  licence             what for
omniglot_small       MIT                 training; the alphabet HELD_OUT_ALPHABET for measuring alone
fashion_mnist_mini   MIT                 training; its test split for measuring alone
emoji_captions       CC BY 4.0, MIT      training; the fifth that `is_held_out` names for measuring alone
mnist10k             CC BY-SA 3.0        measuring alone: a share-alike set trains nothing that ships
cifar10_small        none stated         measuring alone
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
HELD_OUT_ALPHABET = "Early_Aramaic"
GARMENTS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HEADER = 16, 8  # bytes before the values of an IDX file: of images, of labels
SIDE = 28  # of an image in one


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in red, green and blue, and the name of its class."""

    image: Image
    label: str


def is_held_out(caption: str) -> bool:
    """Whether the icon with this caption is of the fifth that no model of the zoo trains on."""
    return int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16) % 5 == 0


# -- sets ----------------------------------------------------------------------------------------------------------


def omniglot(*, held_out: bool) -> list[Picture]:
    """Drawings 105 x 105, black on white, 20 a character; labels are `Alphabet/character`.

    Args:
        held_out: those of HELD_OUT_ALPHABET, or those of the other four
    """
    with zipfile.ZipFile(_file("omniglot_small/images.zip")) as files:
        names = sorted(name for name in files.namelist() if name.startswith(HELD_OUT_ALPHABET) == held_out)
        return [Picture(_opened(files.read(name)), name.rpartition("/")[0]) for name in names]


def fashion(split: str) -> list[Picture]:
    """Garments 28 x 28, light on black.

    Args:
        split: `train` or `test`
    """
    return _idx("fashion_mnist_mini", split, GARMENTS)


def mnist(split: str) -> list[Picture]:
    """Digits 28 x 28, white on black; as `fashion`."""
    return _idx("mnist10k", split, tuple("0123456789"))


def emoji(*, held_out: bool, label: str = "group") -> list[Picture]:
    """Icons 64 x 64 on white; labels are the groups of Unicode, or the names of the icons.

    Args:
        held_out: those whose caption `is_held_out`, or the others
        label: `group` or `caption`
    """
    rows = [json.loads(line) for line in _file("emoji_captions/captions.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if is_held_out(row["caption"]) == held_out]
    with zipfile.ZipFile(_file("emoji_captions/images.zip")) as files:
        return [Picture(_opened(files.read(row["file"])), row[label]) for row in chosen]


def cifar(split: str) -> list[Picture]:
    """Photographs 32 x 32 of ten classes; as `fashion`."""
    with zipfile.ZipFile(_file("cifar10_small/images.zip")) as files:
        names = sorted(name for name in files.namelist() if name.startswith(f"{split}/"))
        return [Picture(_opened(files.read(name)), name.split("/")[1]) for name in names]


def _idx(folder: str, split: str, classes: Sequence[str]) -> list[Picture]:
    parts = ("images-idx3", "labels-idx1")
    files = [gzip.decompress(_file(f"{folder}/{split}-{part}-ubyte.gz").read_bytes()) for part in parts]
    values, labels = (np.frombuffer(file[skip:], np.uint8) for file, skip in zip(files, HEADER, strict=True))
    images = values.reshape(-1, SIDE, SIDE)
    return [
        Picture(PIL.Image.fromarray(image).convert("RGB"), classes[label])
        for image, label in zip(images, labels, strict=True)
    ]


def _opened(data: bytes) -> Image:
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: the zoo is trained from the data sets in {DATA}, which do not ship with it"
        )
    return path


# -- tensors -------------------------------------------------------------------------------------------------------


def classes(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """The names of the classes, sorted."""
    return tuple(sorted({picture.label for picture in pictures}))


def stacked(pictures: Sequence[Picture], side: int) -> Tensor:
    """Pictures stretched to a square, (N, 3, side, side) uint8."""
    resized = [p.image.resize((side, side), PIL.Image.Resampling.BILINEAR) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).contiguous()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between two normal distributions that have the samples' means and covariances.

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

    Heusel et al. (2017), arXiv:1706.08500, there of Inception's features.  It is larger the fewer the rows, so only
    distances between sets of the same sizes compare.

    Args:
        a, b: features, (N, D) and (M, D)
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    root = _root(cov_a)
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix that has no negative eigenvalue but by rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
