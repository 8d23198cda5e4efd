"""Tiny pretrained models that ship with Pegbox, so that no example or test needs a hub.

    model = pegbox.zoo.load("nano-llama")               # an ordinary transformers model
    tokenizer = AutoTokenizer.from_pretrained(pegbox.zoo.folder("nano-llama"))

A model is a folder here, as its library saves it, with a card in its README.md.  One that is another's with an adapter
keeps the adapter alone, and is merged when it is first asked for.  `make zoo` trains them all again.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.core.errors import MissingExtra, ModelError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path(__file__).parent
CARD, CONFIG, ADAPTER = "README.md", "config.json", "adapter_config.json"
FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # a card's YAML


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        summary: what it is, in a line; the first of its card after the title.
        parameters: how many.
        bytes: of its weights as shipped.
        base: the model that it is an adapter on, if it is one.
    """

    name: str
    summary: str
    parameters: int
    bytes: int
    base: str | None


def names() -> tuple[str, ...]:
    """All models, by name."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}")))


def card(name: str) -> str:
    """The card of a model, in Markdown.

    Raises:
        ModelError: no such model, with the nearest.
    """
    return (_shipped(name) / CARD).read_text()


def entry(name: str) -> Entry:
    """What there is to know of a model without loading it.

    Raises:
        ModelError: no such model, with the nearest.
    """
    place = _shipped(name)
    text = FRONT.sub("", card(name))
    summary = next(line for line in text.splitlines() if line and not line.startswith(("#", "-", "<")))
    weights = list(place.glob("*.safetensors"))
    base = json.loads((place / ADAPTER).read_text())["base_model_name_or_path"] if _is_adapter(place) else None
    counted = sum(map(_parameters, weights))
    return Entry(name, summary, counted + (entry(base).parameters if base else 0), _size(weights), base)


def folder(name: str) -> Path:
    """The folder of a model, ready for `from_pretrained`.

    A model that ships as an adapter is merged on the first call, into `PEGBOX_CACHE` (~/.cache/pegbox if not set).

    Raises:
        ModelError: no such model, with the nearest.
    """
    place = _shipped(name)
    return _merged(name) if _is_adapter(place) else place


def load(name: str, **options: Any) -> nn.Module:
    """A model of the zoo, as its own library has it, in eval mode.

    Args:
        options: of its class's `from_pretrained`, `dtype=torch.float32` say; it is in bfloat16 if nothing is said.

    Raises:
        ModelError: no such model, with the nearest.
        MissingExtra: its library is not installed.
    """
    place = folder(name)
    config = json.loads((place / CONFIG).read_text())
    library, cls = ("diffusers", config["_class_name"]) if "_class_name" in config else _transformers_class(config)
    if library == "diffusers":
        options = _of_diffusers(options)
    model: nn.Module = getattr(_imported(library, name), cls).from_pretrained(place, **options)
    return model.eval()


def _of_diffusers(options: dict[str, Any]) -> dict[str, Any]:
    """The same by its names; it would load in float32 if nothing were said."""
    import torch

    return {"torch_dtype": torch.bfloat16} | {"torch_dtype" if k == "dtype" else k: v for k, v in options.items()}


def _transformers_class(config: dict[str, Any]) -> tuple[str, str]:
    return "transformers", config["architectures"][0]


def _imported(library: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtra(library, "diffusion", f"model {name!r}") from error


def _shipped(name: str) -> Path:
    if name not in names():
        raise ModelError(f"the zoo has no model {name!r}{did_you_mean(name, names())}")
    return FOLDER / name


def _is_adapter(place: Path) -> bool:
    return (place / ADAPTER).is_file()


def _size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _parameters(weights: Path) -> int:
    """Values in a safetensors file, by its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = (tensor["shape"] for name, tensor in header.items() if name != "__metadata__")
    return sum(functools.reduce(int.__mul__, shape, 1) for shape in shapes)


def _merged(name: str) -> Path:
    """The folder of an adapter's model, merged into its base; made once for each version of both."""
    from pegbox.zoo.merged import merged

    place = FOLDER / name
    base = json.loads((place / ADAPTER).read_text())["base_model_name_or_path"]
    cache = Path(os.environ.get("PEGBOX_CACHE") or Path.home() / ".cache" / "pegbox")
    return merged(folder(base), place, cache / "zoo")
