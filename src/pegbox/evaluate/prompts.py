"""What a user asks, as token ids: plain text, or a conversation through a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pegbox.core.errors import DataError
from pegbox.data.templates import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def ids_of(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Token ids of a prompt, up to where the model's answer begins.

    Args:
        prompt: a text, or messages.  A text is a user's turn where there is a chat template, else the start of a text
            to go on with.
        template: a chat template by name or as Jinja text; the tokenizer's own if not given.
        system: a first message; not added to messages that begin with one.
        raw: take a text as it is, whatever templates there are.

    Raises:
        DataError: messages and no template, or no text at all.
    """
    if isinstance(prompt, str) and (raw or not (template or tokenizer.chat_template)):
        if system:
            raise DataError("a system message needs a chat template; pass template=")
        ids = tokenizer(prompt)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id] and ids[:-1]:
            ids = ids[:-1]  # some tokenizers end every text, and an ended text has no continuation
        return _some(ids, prompt)
    messages: list[Any] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    )
    if system and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template_of(tokenizer, template), tokenize=False, add_generation_prompt=True
    )
    return _some(tokenizer(text, add_special_tokens=False)["input_ids"], prompt)


def _some(ids: list[int], prompt: Prompt) -> list[int]:
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no tokens")
    return ids


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, longest), with padding on one side."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[k, place] = torch.tensor(row)
        mask[k, place] = 1
    return ids, mask


PROMPT_COLUMNS = ("messages", "conversations", "prompt", "instruction", "query", "question", "text")


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt in a row of a file: messages (without the answer they end with), or a text.

    Raises:
        DataError: none of PROMPT_COLUMNS is there.
    """
    column = next((c for c in PROMPT_COLUMNS if row.get(c)), None)
    if column is None:
        raise DataError(f"{where} has no prompt; it has {', '.join(row)}, and a prompt is one of {PROMPT_COLUMNS}")
    value = row[column]
    if isinstance(value, str):
        return f"{value}\n{row['input']}" if column == "instruction" and row.get("input") else value
    turns = [_turn(turn, where) for turn in value]
    return turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" else turns


SPEAKERS = {"human": "user", "gpt": "assistant"}


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} has a message that is {type(turn).__name__}, not role and content")
    if "role" in turn and "content" in turn:
        return turn
    if "from" in turn and "value" in turn:
        return {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
    raise DataError(f"{where} has a message with {', '.join(turn)}, not role and content")
