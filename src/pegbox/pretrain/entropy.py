"""How surprised a base is by the answers of instruction data, and which examples are chosen by it.

Yang et al., "MindLLM: Pre-training Lightweight Large Language Model from Scratch, Evaluations and Domain
Applications", 2023 (arXiv 2310.15777):

    h(q, a) = -1/|a| sum_t log p(a_t | q, a_<t)        in nats a token; a: what the assistant says

A low h is known already, a very high one is noise or out of the base's reach; `band` keeps what lies between.  The
paper does not give its cut-offs, 0.25 and 0.75 are ours.  Its code is not published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pegbox.core.errors import SettingsError
from pegbox.core.headless import evaluating
from pegbox.data.collate import PadCollator
from pegbox.data.encoded import IGNORE, Encoded
from pegbox.data.tokenise import encode_each
from pegbox.objectives.answers import score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

How = Literal["all", "band", "lowest", "highest"]


@torch.no_grad()
def answer_entropy(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_length: int = 1024,
    batch_size: int = 16,
    template: str | None = None,
) -> list[float]:
    """h of each example, in nats a token of the assistant's words.

    The chat template's own tokens are left out, end-of-turn tokens too: a base has never seen them, and of short
    answers they would be most.

    Args:
        model: a language model, which is asked as it would be to generate: nothing is dropped out.
        examples: conversations (`messages`), or prompts and completions.
        max_length: tokens read of an example.
        batch_size: rows of one forward; changes no result by more than rounding.
        template: as of a run.

    Returns:
        (examples,) numbers; NaN for an example that a run would reject, as one without an answer.

    Raises:
        DataError: the tokenizer has no chat template, or one that cannot be trained on.
    """
    found = [math.nan] * len(examples)
    encoded = encode_each(examples, tokenizer, max_length=max_length, template=template)
    rows = {k: _words(row, tokenizer) for k, row in enumerate(encoded) if isinstance(row, Encoded)}
    order = sorted(rows, key=lambda k: len(rows[k]))  # rows of a batch of similar length
    collate = PadCollator(_pad(tokenizer))
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in collate([rows[k] for k in chosen]).items()}
            answers, _ = score(model, batch)
            for k, mean, tokens in zip(chosen, answers.means.tolist(), answers.tokens.tolist(), strict=True):
                found[k] = -mean if tokens else math.nan
    return found


def select(
    values: Sequence[float], how: How, *, band: tuple[float, float] = (0.25, 0.75), share: float = 0.5
) -> list[int]:
    """Which examples are kept, as indices in their order.

    Examples are ranked by their value, equal ones by their place; NaN is never kept.  Of n that have a value, `band`
    keeps the ranks from n * band[0] to n * band[1], so that a band inside another keeps a part of what that keeps;
    `lowest` and `highest` keep n * share; each to the nearest whole number.

    Raises:
        SettingsError: a band that is not 0 <= low < high <= 1, or nothing is kept.
    """
    ranked = sorted((k for k, value in enumerate(values) if not math.isnan(value)), key=lambda k: (values[k], k))
    low, high = _quantiles(how, band, share)
    kept = sorted(ranked[int(low * len(ranked) + 0.5) : int(high * len(ranked) + 0.5)])
    if not kept:
        raise SettingsError(
            f"instruct.select={how} keeps none of {len(values)} examples, {len(ranked)} of which have an entropy; "
            "widen instruct.band, raise instruct.share, or set instruct.select=all"
        )
    return kept


def _quantiles(how: How, band: tuple[float, float], share: float) -> tuple[float, float]:
    low, high = band
    if not 0 <= low < high <= 1:
        raise SettingsError(f"instruct.band must be two quantiles, 0 <= low < high <= 1, got {list(band)}")
    return {"all": (0.0, 1.0), "band": band, "lowest": (0.0, share), "highest": (1 - share, 1.0)}[how]


def _words(row: Encoded, tokenizer: Tokenizer) -> Encoded:
    """A row in which the template's own tokens, all of them special, have no label."""
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    return replace(row, labels=[IGNORE if label in special else label for label in row.labels])


def _pad(tokenizer: Tokenizer) -> int:
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
