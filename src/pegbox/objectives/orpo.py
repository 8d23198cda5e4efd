"""ORPO: Monolithic Preference Optimization without Reference Model (Hong, Lee and Thorne, 2024), arXiv:2403.07691.

    loss = nll(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))
    odds(y) = p(y) / (1 - p(y))        log p(y) = log p(y | x) / |y|, over the answer's tokens

beta is the paper's lambda.  The paper writes the likelihood term over the answer; its code, and so this by default,
takes prompt and answer of the chosen (`prompt=false` is the paper's text).  The likelihood is a mean over tokens, the
odds over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core.settings import setting
from pegbox.objectives.answers import Answers, by_answer, count_answers, count_pairs, halves, token_log_probs
from pegbox.objectives.causal_lm import IGNORED, router_loss, targets
from pegbox.objectives.objective import Batch, Losses, Objective, Predictions, Settings
from pegbox.objectives.preference import log1mexp, measure, scores


@dataclass(frozen=True, kw_only=True)
class ORPO(Settings):
    """What `objective.KEY` sets."""

    beta: float = setting(0.1, "weight of the odds ratio beside the likelihood", above=0)
    prompt: bool = setting(True, "learn the prompt of the chosen answer too, as the authors' code does")


DEFAULTS = ORPO()


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log odds(chosen) - log odds(rejected), of log-probabilities a token (P,) each."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo(model: nn.Module, batch: Batch, *, settings: ORPO = DEFAULTS, num_items: Tensor | None = None) -> Losses:
    """The loss of a batch of pairs.

    Args:
        model: a language model, as it is or wrapped
        batch: pairs, see `pegbox.objectives.answers`
        num_items: pairs and likelihood tokens (2,) that the sums are divided by, see `count`; the batch's own if None

    Returns:
        `nll` and `odds`, and `aux` where the model has routers.
    """
    own = count(batch, settings=settings)
    pairs, tokens = own if num_items is None else num_items
    answers, nll, _, output = _score(model, batch, settings)
    losses = -settings.beta * F.logsigmoid(log_odds(*halves(answers.means)))
    named = {"nll": nll.sum() / tokens, "odds": losses.sum() / pairs}
    router = router_loss(model, output)
    return named if router is None else named | {"aux": router * own[0] / pairs}


def _score(model: nn.Module, batch: Batch, settings: ORPO) -> tuple[Answers, Tensor, Tensor, Any]:
    """Answers, and of each chosen one the likelihood loss (P,) and the tokens it is over (P,), in one forward."""
    learned, answer = _labels(batch, settings)
    values, output = token_log_probs(model, batch, torch.where(answer != IGNORED, answer, learned))
    answers = Answers(by_answer(values * (answer != IGNORED), batch), by_answer(answer != IGNORED, batch))
    nll, _ = halves(-by_answer(values * (learned != IGNORED), batch))
    tokens, _ = halves(by_answer(learned != IGNORED, batch))
    return answers, nll, tokens, output


def _labels(batch: Batch, settings: ORPO) -> tuple[Tensor, Tensor]:
    """(B, T) of the likelihood, which the chosen answers alone have, and of the answers; -100 elsewhere."""
    answer, _ = targets(batch)
    whole, _ = targets({**batch, "labels": _all_tokens(batch)}) if settings.prompt else (answer, None)
    return whole.masked_fill(~_chosen(batch), IGNORED), answer


def _all_tokens(batch: Batch) -> Tensor:
    """Every token as a label (B, T), padding -100."""
    mask, segments = batch.get("attention_mask"), batch.get("segments")
    there = mask.bool() if mask is not None else torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if segments is not None:
        there = segments >= 0
    return torch.where(there, batch["input_ids"], IGNORED)


def _chosen(batch: Batch) -> Tensor:
    """Whether a position is of a chosen answer: (B, T), or (B, 1) where rows are answers."""
    pairs = int(count_pairs(batch))
    segments = batch.get("segments")
    if segments is not None:
        return (segments >= 0) & (segments < pairs)
    return (torch.arange(int(count_answers(batch)), device=batch["input_ids"].device) < pairs)[:, None]


def count(batch: Batch, *, settings: ORPO = DEFAULTS, **rest: Any) -> Tensor:
    """(2,): pairs, and the tokens of the likelihood."""
    learned, _ = _labels(batch, settings)
    pairs = count_pairs(batch)
    return torch.stack([pairs, (learned != IGNORED).sum().to(pairs.dtype)])


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, settings: ORPO = DEFAULTS) -> Predictions:
    """Of each pair (P,): its `losses` (the likelihood as a mean over its own tokens), and the rewards, beta times the
    log-probability a token, `chosen` and `rejected`."""
    answers, nll, tokens, _ = _score(model, batch, settings)
    chosen, rejected = halves(answers.means)
    losses = nll / tokens.clamp(min=1) - settings.beta * F.logsigmoid(log_odds(chosen, rejected))
    return scores(losses, settings.beta * chosen, settings.beta * rejected)


OBJECTIVE = Objective(
    "orpo", orpo, count, predict, measure, best="reward_accuracy", higher_is_better=True, settings=ORPO
)
