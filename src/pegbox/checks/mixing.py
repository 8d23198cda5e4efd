"""What one batch may hold: rows of several methods, several examples in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from pegbox import methods
from pegbox.checks.case import smallest, suited
from pegbox.checks.check import check
from pegbox.checks.generating import NEW
from pegbox.checks.lab import FP32, Lab, logits, require_close, require_equal, require_raises, shake
from pegbox.checks.models import LENGTH
from pegbox.checks.when import generates, in_one_stack, keeps_base, packs, packs_not, per_row
from pegbox.core.errors import CannotMix, ModelError
from pegbox.core.method import Method
from pegbox.core.settings import build
from pegbox.core.tuned import Tuned

ROUNDING = 3 * FP32  # convolutions of fewer rows round otherwise
ROWS: tuple[str | None, ...] = ("small", None, "whole", "other")


@check(per_row, keeps_base, on="all")
def rows_mix_methods(lab: Lab) -> None:
    """In a batch of this method, the same with its least settings, another one and the base, every row is as alone."""
    tuned = _three(lab)
    with tuned.rows(ROWS):
        have = lab.output(tuned)
    for row, name in enumerate(ROWS):
        want = lab.output(tuned.use(name) if name else lab.model())
        require_close(have[row], want[row], f"row {row} with {name}", ROUNDING)


@check(per_row, keeps_base, generates, on="all")
def rows_write_as_alone(lab: Lab) -> None:
    """Such a batch writes, with a cache, what each row writes alone; or, where its adapters share none, a CannotMix."""
    tuned = _three(lab)
    try:
        with tuned.rows(ROWS):
            have = _written(lab, tuned)
    except CannotMix:
        return
    for row, name in enumerate(ROWS):
        if name:
            want = _written(lab, tuned.use(name))
        else:
            with tuned.disabled():
                want = _written(lab, tuned)
        require_equal(have[row], want[row], f"tokens of row {row}, with {name},")


def _three(lab: Lab) -> Tuned:
    """This method, the same with its least settings, and another one."""
    tuned = lab.shaken(name="whole")
    shake(tuned.add("small", smallest(lab.method)), 2)
    return shake(tuned.add("other", _other(lab)), 3).eval()


def _other(lab: Lab) -> Method:
    name = "miss" if lab.method.name() == "lora" else "lora"
    return suited(build(methods.get(name), {"rank": 2}), lab.family)


@torch.no_grad()
def _written(lab: Lab, tuned: Tuned) -> Tensor:
    tokens: Tensor = tuned.generate(**_prompt(lab), max_new_tokens=NEW, do_sample=False, use_cache=True)
    return tokens[:, -NEW:]


def _prompt(lab: Lab) -> dict[str, Tensor]:
    batch = lab.inputs()
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@check(packs, in_one_stack, on="all")
def a_packed_row_is_its_examples(lab: Lab) -> None:
    """Two examples in one row, told by their positions, get what each gets alone."""
    tuned = lab.shaken()
    ids = lab.inputs()["input_ids"]
    with torch.no_grad():
        have = logits(tuned(input_ids=ids, position_ids=_restarted(ids), use_cache=False))
        for part in (slice(0, 3), slice(3, LENGTH)):
            want = logits(tuned(input_ids=ids[:, part], use_cache=False))
            require_close(have[:, part], want, f"tokens {part.start} to {part.stop} of a packed row")


@check(packs_not, in_one_stack, on="all")
def packed_rows_are_refused(lab: Lab) -> None:
    """As traits.packs is False, a packed row is a ModelError that says so."""
    tuned, ids = lab.tuned(), lab.inputs()["input_ids"]
    with require_raises(ModelError, "a packed row", "packed"):
        tuned(input_ids=ids, position_ids=_restarted(ids), use_cache=False)


def _restarted(ids: Tensor) -> Tensor:
    """Positions of examples of 3 and LENGTH - 3 tokens in each row."""
    return torch.cat([torch.arange(3), torch.arange(LENGTH - 3)]).expand(len(ids), -1)
