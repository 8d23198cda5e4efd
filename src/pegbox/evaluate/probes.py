"""Probes: the inputs on which two models are compared.

The user's own held-out rows come first, then a few short texts in several scripts, code and numbers, written for this
purpose; a model without a tokenizer gets token ids drawn from a seed, an image model drawn pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 64  # tokens kept of a probe
ROWS = 16  # of the user's rows

TEXTS = {
    "English": "The tuning pegs of an old cello slip when the weather turns dry.",
    "one word": "Hello",
    "German": "Der Wirbelkasten hält alle vier Wirbel; schön, daß er noch ganz ist.",
    "French": "Où est passé le luthier qui réparait les violons près de la gare ?",
    "Spanish": "¿Cuántas cuerdas tiene una vihuela? Seis órdenes, según el año.",
    "Russian": "Скрипичный мастер натянул новую струну и проверил строй.",
    "Greek": "Το παλιό λαούτο έχει τέσσερα ζεύγη χορδών.",
    "Arabic": "العود آلة وترية قديمة لها صندوق خشبي كبير.",
    "Hebrew": "הכינור עמד בפינה ולא ניגנו בו שנים.",
    "Hindi": "सितार के तार हर सुबह मिलाए जाते हैं।",
    "Chinese": "琴师先调好四根弦,然后才开始演奏。",
    "Japanese": "三味線の糸巻きは三つあります。",
    "Korean": "가야금 줄을 다시 맞추어 주세요.",
    "Thai": "ช่างซ่อมไวโอลินอยู่ที่ถนนเก่า",
    "Python": "def tune(strings):\n    return [s.pitch * 2 ** (k / 12) for k, s in enumerate(strings)]\n",
    "JSON": '{"string": "A", "hertz": 442.0, "worn": false, "pegs": [1, 2, 3, 4]}',
    "numbers": "440 / 3 = 146.6667; 7 x 8 = 56; 12,345.60 EUR on 2024-02-29 at 09:05",
    "emoji": "Bravo 🎻🎶 -- encore!!",
}


@dataclass(frozen=True)
class Probe:
    """One input, a batch of one row.

    Attributes:
        name: where it comes from.
        inputs: what the model is called with.
    """

    name: str
    inputs: dict[str, Tensor]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in self.inputs.items()}


def probes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: Iterable[Mapping[str, Any] | str] = (),
    *,
    seed: int = 0,
) -> list[Probe]:
    """The user's rows (up to ROWS of them) and the built-in probes.

    Args:
        rows: canonical examples, or plain texts.
        seed: of drawn ids and pixels.

    Raises:
        DataError: rows of text without a tokenizer, or a row of no known kind.
        ModelError: a model that reads neither ids nor pixels, or ids that its embedding does not have.
    """
    own = [from_row(row, f"row {i + 1}", tokenizer) for i, row in zip(range(ROWS), rows, strict=False)]
    return [*fitted(own, model), *builtin(model, tokenizer, seed=seed)]


def builtin(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0) -> list[Probe]:
    """TEXTS through the tokenizer, or drawn token ids, or drawn pixels, by what the model reads."""
    reads = _reads(model)
    if reads == "pixel_values":
        return list(random_pixels(model, seed))
    if reads != "input_ids":
        raise ModelError(f"there are no built-in probes for a model that reads {reads!r}; pass probes=[Probe(...)]")
    if tokenizer is None:
        return fitted(random_ids(model, seed), model)
    return fitted([from_row(text, f"text: {name}", tokenizer) for name, text in TEXTS.items()], model)


def from_row(row: Mapping[str, Any] | str, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Probe:
    """A canonical example, or a text, as a probe."""
    if isinstance(row, Mapping) and "input_ids" in row:
        return _of_ids(name, torch.tensor([list(row["input_ids"])]))
    if tokenizer is None:
        raise DataError(f"{name} is text, and there is no tokenizer to read it with; pass tokenizer=")
    encoded = tokenizer(**_words(row, name, tokenizer), return_tensors="pt", truncation=True, max_length=LENGTH)
    known = ("input_ids", "attention_mask", "token_type_ids")
    return Probe(name, {key: encoded[key] for key in known if key in encoded})


def _words(row: Mapping[str, Any] | str, name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of the tokenizer for one row."""
    if isinstance(row, str):
        return {"text": row}
    if "text" in row:
        return {"text": row["text"], **({"text_pair": row["text_pair"]} if row.get("text_pair") else {})}
    if "tokens" in row:
        return {"text": list(row["tokens"]), "is_split_into_words": True}
    chat = row.get("messages") or [*(row.get("prompt") or ()), *(row.get("chosen") or ())]
    if not chat:
        raise DataError(f"{name} has none of text, tokens, messages, prompt or input_ids; it has: {', '.join(row)}")
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(chat, tokenize=False, tools=row.get("tools"))
        return {"text": text, "add_special_tokens": False}
    return {"text": "\n".join(str(turn["content"]) for turn in chat)}


def random_ids(model: nn.Module, seed: int = 0, lengths: Sequence[int] = (1, 7, 24, 48)) -> list[Probe]:
    """Token ids drawn from the model's vocabulary, one row of each length."""
    rows, generator = _vocabulary(model), torch.Generator().manual_seed(seed)
    drawn = [torch.randint(rows, (1, length), generator=generator) for length in lengths]
    return [_of_ids(f"{ids.shape[1]} random ids", ids) for ids in drawn]


def _of_ids(name: str, ids: Tensor) -> Probe:
    return Probe(name, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def random_pixels(model: nn.Module, seed: int = 0, count: int = 4) -> Iterator[Probe]:
    """Images (1, channels, height, width) of N(0, 1) noise, as pre-processing leaves pixels."""
    whole: Any = model.config
    config = getattr(whole, "vision_config", whole)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
        yield Probe(f"random image {k + 1}", {"pixel_values": pixels})


def fitted(made: Sequence[Probe], model: nn.Module) -> list[Probe]:
    """Cut to what the model can hold, with a decoder's start where it has a decoder.

    Raises:
        ModelError: a token id that the model's embedding does not have.
    """
    rows, length = _vocabulary(model), min(LENGTH, _positions(model))
    return [_decoding(_cut(probe, rows, length), model) for probe in made]


def _cut(probe: Probe, rows: int, length: int) -> Probe:
    highest = int(probe.inputs["input_ids"].max()) if probe.inputs["input_ids"].numel() else -1
    if not 0 <= highest < rows:
        raise ModelError(
            f"{probe.name} has token id {highest}, and the model's embedding has {rows} rows (0..{rows - 1})"
        )
    return Probe(probe.name, {key: value[:, :length] for key, value in probe.inputs.items()})


def _decoding(probe: Probe, model: nn.Module) -> Probe:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return probe
    start = getattr(config, "decoder_start_token_id", None) or getattr(config, "pad_token_id", None) or 0
    ids = probe.inputs["input_ids"]
    shifted = torch.cat([ids.new_full((1, 1), start), ids[:, :7]], dim=1)
    return Probe(probe.name, {**probe.inputs, "decoder_input_ids": shifted})


def _reads(model: nn.Module) -> str:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return str(model.main_input_name)
    raise ModelError(f"what a {type(model).__name__} reads is not known; pass probes=[Probe(name, inputs)]")


def _vocabulary(model: nn.Module) -> int:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"the vocabulary of a {type(model).__name__} is not known; pass probes=[Probe(name, inputs)]")
    table: Any = model.get_input_embeddings().weight
    return int(table.shape[0])


def _positions(model: nn.Module) -> int:
    """How many tokens the model can hold, two fewer than its table has: RoBERTa counts from its padding id on."""
    config: Any = model.config
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limit = min((n for n in known if isinstance(n, int) and n > 2), default=LENGTH + 2)
    return limit - 2
