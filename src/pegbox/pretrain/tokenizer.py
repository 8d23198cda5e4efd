"""A byte-level BPE tokenizer, trained on the corpus or taken from elsewhere; the one way in which texts are encoded.

Byte-level: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; BPE: Sennrich et al., "Neural
Machine Translation of Rare Words with Subword Units", 2016 (arXiv 1508.07909).  Every byte has a token, so no text has
an unknown one, and decoding gives back what was encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pegbox.core.errors import DataError, SettingsError
from pegbox.pretrain.settings import Recipe, TokenizerSettings

if TYPE_CHECKING:
    from pegbox.pretrain.corpus import Corpus

SPECIAL = ("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # ids 0, 1, 2, ...
ALPHABET = 256  # a token for each byte
FOLDER, SEAL = "tokenizer", "pegbox.json"
BATCH = 256  # texts encoded at once
BATCH_SIZE = 1 << 20  # characters at once, where texts are long
PROBED = 1 << 20  # characters of each source that the bytes a token are counted on

# GPT-2's pieces, with digits one by one (sums), letters together with their marks, and apostrophes of books
PIECES = r"['’](?:s|t|re|ve|m|ll|d)| ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}{{- message.content + '<|end|>' }}{%- endgeneration %}
    {%- elif message.role in ('system', 'user') %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- raise_exception('no place for the role ' + message.role + '; known are system, user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def train(texts: Iterable[str], settings: TokenizerSettings) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `settings.size` entries, with a chat template; the same texts give the same one.

    Args:
        texts: read once; `settings.sample` of them, drawn at random, are counted.  Memory holds their different words.

    Returns:
        Encodes with `<s>` in front.  Fewer entries than asked for where the texts have no more pairs to merge.

    Raises:
        SettingsError: `size` has no room for the bytes and the special tokens.
    """
    least = ALPHABET + len(SPECIAL)
    if settings.size < least:
        raise SettingsError(
            f"tokenizer.size is {settings.size}, below the {ALPHABET} bytes and {len(SPECIAL)} special tokens that "
            f"every tokenizer here has; give at least {least}, and 4096 for a small model"
        )
    inner = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.size,
        min_frequency=settings.least,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_drawn(texts, settings.sample, random.Random(0)), trainer)
    start = SPECIAL[0]
    inner.post_processor = processors.TemplateProcessing(f"{start} $A", f"{start} $A $B", [(start, 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start,
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def prepare(recipe: Recipe, corpus: Corpus, say: Callable[[str], None]) -> PreTrainedTokenizerFast:
    """The tokenizer in `output/tokenizer`: the one that is there if it was made of the same, else made now.

    Sources are weighted as in training: one whose share of the rows is twice its share of the text is counted twice.

    Args:
        recipe: `tokenizer.path`, if given, is loaded and copied instead of training.

    Raises:
        SettingsError: as of `train`; a tokenizer at `path` that cannot be loaded, or lacks what rows need.
        DataError: the folder cannot be written; an earlier one is then still there.
    """
    folder = Path(recipe.output) / FOLDER
    given = _given(recipe.tokenizer.path) if recipe.tokenizer.path else None
    made_from = {"given": identity(given)} if given is not None else _made_from(recipe, corpus)
    found = _found(folder, made_from)
    if found is not None:
        say(f"tokenizer: {len(found)} entries, as made before")
        return found
    made = train(_weighted(recipe, corpus), recipe.tokenizer) if given is None else given
    rates = {name: bytes_per_token(made, corpus.texts(name)) for name in corpus.files}
    _save(made, folder, {"made_from": made_from, "bytes_per_token": rates})
    say(f"tokenizer: {len(made)} entries; bytes a token: {', '.join(f'{n} {r:.2f}' for n, r in rates.items())}")
    return made


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[list[int]]:
    """Tokens of each text, without special ones: a text in which `</s>` is spelled out gets the letters of that."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    for batch in _batches(texts):
        for encoding in inner.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids


def ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Ids that a text begins and ends with; a tokenizer with one for both (GPT-2) gives it twice.

    Raises:
        SettingsError: it has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise SettingsError(
            "the tokenizer has no end-of-text token (eos_token), with which a text in a row of several has to end; "
            "set it, or leave tokenizer.path out to have one trained"
        )
    start = tokenizer.bos_token_id
    return (end if start is None else start), end


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """UTF-8 bytes a token over the first million characters; 0 without any text."""
    some, size = [], 0
    for text in texts:
        some.append(text[: PROBED - size])
        size += len(some[-1])
        if size >= PROBED:
            break
    tokens = sum(map(len, encode(tokenizer, some)))
    return sum(len(text.encode()) for text in some) / tokens if tokens else 0.0


def identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides how texts are encoded."""
    spelled = [tokenizer.backend_tokenizer.to_str(), *map(str, ends(tokenizer))]
    return hashlib.sha256("\n".join(spelled).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# -- which texts it is trained on --------------------------------------------------------------------------------------


def _weighted(recipe: Recipe, corpus: Corpus) -> Iterator[str]:
    """Texts of all sources, each as often as its source's weight asks for."""
    sizes = {name: sum(map(len, corpus.texts(name))) for name in corpus.files}
    weights = {name: recipe.sources[name].weight for name in corpus.files}
    each = sum(sizes.values()) / sum(weights.values())
    draw = random.Random(recipe.seed)
    return chain.from_iterable(
        _drawn(corpus.texts(name), weights[name] * each / sizes[name], draw) for name in corpus.files if sizes[name]
    )


def _drawn(texts: Iterable[str], copies: float, draw: random.Random) -> Iterator[str]:
    """Each text `copies` times on average."""
    for text in texts:
        for _ in range(int(copies + draw.random())):
            yield text


# -- the folder --------------------------------------------------------------------------------------------------------


def _made_from(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    settings = recipe.tokenizer
    plain: dict[str, Any] = {"size": settings.size, "sample": settings.sample, "least": settings.least}
    plain["weights"] = {name: recipe.sources[name].weight for name in corpus.files}
    plain["texts"] = {name: file_hash(corpus.files[name]) for name in corpus.files}
    return {**plain, "seed": recipe.seed}


def _given(path: str) -> PreTrainedTokenizerFast:
    try:
        loaded = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"tokenizer.path: no tokenizer can be loaded from {path!r} ({_first_line(error)}); give a folder with a "
            "tokenizer.json, or leave tokenizer.path out to have one trained"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise SettingsError(f"tokenizer.path: {path!r} has no tokenizer.json, which encodes whole batches at once")
    ends(loaded)
    return loaded


def _found(folder: Path, made_from: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder, if it was made of this.

    Raises:
        DataError: it was, and is damaged.
    """
    try:
        seal = json.loads((folder / SEAL).read_text())
    except (OSError, ValueError):
        return None
    if seal.get("made_from") != made_from:
        return None
    for name, digest in seal["files"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != digest:
            raise DataError(f"{folder / name} is missing or not what was written; delete {folder} to have it made anew")
    return _given(str(folder))


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path, seal: Mapping[str, Any]) -> None:
    part = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        tokenizer.save_pretrained(part)
        files = {path.name: file_hash(path) for path in sorted(part.iterdir())}
        (part / SEAL).write_text(json.dumps({**seal, "files": files}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}; one that was there before is intact"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
