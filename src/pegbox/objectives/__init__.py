"""Objectives: functions of a model and a batch to named losses, whose sum is the loss.

    objective = pegbox.objectives.get("causal_lm")
    losses = objective(model, batch, num_items=objective.count(batch))      # {"nll": ...}

Each file here is one objective and is loaded when it is asked for.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

from pegbox.core.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from pegbox.objectives.objective import Objective

NAMES = (
    "causal_lm", "contrastive", "denoising", "dpo", "image_classification", "ipo", "kto", "orpo", "regression",
    "reward", "seq2seq", "sequence_classification", "sft", "simpo", "token_classification",
)  # fmt: skip
ALIASES = {  # what HF PEFT, ms-swift, LLaMA-Factory and transformers' pipelines call them
    "lm": "causal_lm",
    "pt": "causal_lm",
    "pretrain": "causal_lm",
    "text_generation": "causal_lm",
    "seq_cls": "sequence_classification",
    "classification": "sequence_classification",
    "text_classification": "sequence_classification",
    "seq_reg": "regression",
    "token_cls": "token_classification",
    "ner": "token_classification",
    "seq_2_seq_lm": "seq2seq",
    "text2text_generation": "seq2seq",
    "summarization": "seq2seq",
    "translation": "seq2seq",
    "clip": "contrastive",
    "image_cls": "image_classification",
    "diffusion": "denoising",
    "ddpm": "denoising",
    "rm": "reward",
    "reward_model": "reward",
    "reward_modeling": "reward",
}


def canonical(name: str) -> str:
    """The name in `NAMES` that a name or alias means; case, dashes and spaces do not matter.

    Raises:
        SettingsError: none; the message names the nearest.
    """
    key = re.sub(r"[-\s]+", "_", name.strip().lower())
    key = ALIASES.get(key, key)
    if key not in NAMES:
        raise SettingsError(f"unknown objective {name!r}{did_you_mean(key, [*NAMES, *ALIASES])}")
    return key


def get(name: str) -> Objective:
    """An objective by name or alias (`"causal_lm"`, `"SEQ_CLS"`, `"sequence-classification"`).

    Raises:
        SettingsError: an unknown name; the message names the nearest.
    """
    key = canonical(name)
    objective: Objective = import_module(f"{__name__}.{key}").OBJECTIVE
    return objective
