"""Defects that the author of a method could make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pegbox.checks import Case
from pegbox.core import LowRankGraft, Method, Tuned
from pegbox.core.low_rank import as_matrix
from pegbox.methods.bitfit import BitFit
from pegbox.methods.dora import DoRAGraft
from pegbox.methods.full import Full
from pegbox.methods.lisa import LISA
from pegbox.methods.lora import LoRA, LoRAGraft
from pegbox.methods.miss import MiSS
from pegbox.methods.prompt_tuning import Prompt, PromptTuning
from pegbox.methods.series import SeriesGraft

from .masked import Masked, MaskedGraft
from .mutant import Mutant, after_init, around, declare, put

LORA_PEFT, MISS_PEFT = LoRA.traits.peft, MiSS.traits.peft
assert LORA_PEFT is not None
assert MISS_PEFT is not None

LORA = Case("lora", {"rank": 4, "alpha": 6.0})
DORA = Case("dora", {"rank": 4, "alpha": 6.0})
MISS = Case("miss", {"rank": 5})
MINI = Case("miss", {"rank": 8, "mini": 4})
BAT = Case("bat", {"rank": 4})
SERIES = Case("series", {"bottleneck": 4})
PREFIX = Case("prefix_tuning", {"tokens": 3})
PROMPT = Case("prompt_tuning", {"tokens": 3})
BITFIT = Case("bitfit")
FULL = Case("full")
TURNS = Case("lisa", {"active": 1, "period": 2})
MASKED = Case(Masked)


def draw_b(graft: LoRAGraft) -> None:
    nn.init.normal_(graft.b)


def forget_a(graft: LoRAGraft) -> None:
    a = graft.a.data
    del graft.a
    graft.a = a  # type: ignore[assignment]


def factors_times(change: Any) -> Any:
    def factors(original: Any, self: Any) -> Any:
        down, up, scale = original(self)
        return change(self, down, up, scale)

    return around(LoRAGraft, "factors", factors)


def growing(graft: Any, down: Any, up: Any, scale: float) -> Any:
    graft.__dict__["calls"] = graft.__dict__.get("calls", 0) + 1
    return down, up, scale * (1 + 0.1 * graft.__dict__["calls"])


def move_base(original: Any, self: Any, base: Any, x: Any) -> Any:
    with torch.no_grad():
        base.site.module.weight.add_(1e-4)
    return original(self, base, x)


def hang_into_base(original: Any, self: Any, site: Any, shared: Any) -> Any:
    graft = original(self, site, shared)
    site.module.adapter = graft
    return graft


def dropped(rate_of: Any) -> Any:
    """LoRA's forward with dropout at another time than training."""

    def forward(self: Any, base: Any, x: Any) -> Any:
        return base.low_rank(x, *self.factors(), dropped=nn.functional.dropout(x, rate_of(self)))

    return put(LowRankGraft, "forward", forward)


def break_graph(original: Any, self: Any, base: Any, x: Any) -> Any:
    torch._dynamo.graph_break()
    return original(self, base, x)


def unscaled(self: Any, w: Any) -> Any:
    down, up, _ = self.factors()
    return w + up @ as_matrix(down, w.shape[1], up)


def doubled_settings(original: Any, self: Any, **settings: Any) -> None:
    original(self, **settings)
    object.__setattr__(self, "alpha", 2 * self.alpha)


MUTANTS = [
    Mutant(
        "settings_survive_json",
        LORA,
        "a constructor that does more than store",
        around(LoRA, "__init__", doubled_settings),
    ),
    Mutant("settings_hide_no_verb", MASKED, "a setting hides a verb", put(Method, "share", lambda self: None)),
    Mutant("seams_are_declared", LORA, "the weight seam is not declared", declare(LoRA, seams=("output", "update"))),
    Mutant("seams_are_declared", LORA, "the update seam is not declared", declare(LoRA, seams=("weight",))),
    Mutant("seams_are_declared", FULL, "the selection seam is not declared", declare(Full, seams=("output",))),
    Mutant(
        "needs_are_refused_where_they_lack",
        BITFIT,
        "a norm without a bias is taken for one with",
        put(BitFit, "sites", lambda self, model, anatomy: ["model.norm"]),
        family="llama",
    ),
    Mutant("expected_failures_are_checks", LORA, "a misspelt xfail", declare(LoRA, xfail={"starts": "why"})),
    Mutant("starts_as_declared", LORA, "B is drawn, not zero", after_init(LoRAGraft, draw_b)),
    Mutant("starts_as_declared", PROMPT, "identity is claimed", declare(PromptTuning, identity=True)),
    Mutant("starts_as_declared", LORA, "identity is denied", declare(LoRA, identity=False)),
    Mutant(
        "size_is_its_formula", LORA, "the formula forgets A", put(LoRA, "size", lambda self, s: self.rank * s.shape[0])
    ),
    Mutant("size_is_its_formula", LORA, "A is a tensor, not a parameter", after_init(LoRAGraft, forget_a)),
    Mutant(
        "trained_values_matter",
        LORA,
        "the forward is the base's",
        put(LoRAGraft, "forward", lambda self, base, x: base(x)),
    ),
    Mutant(
        "gradients_reach_what_trains",
        LORA,
        "A is detached in the forward",
        factors_times(lambda self, down, up, scale: (down.detach(), up, scale)),
    ),
    Mutant(
        "training_lowers_the_loss",
        LORA,
        "gradients with the wrong sign",
        after_init(LoRAGraft, lambda g: [p.register_hook(lambda grad: -grad) for p in g.parameters()]),
    ),
    Mutant(
        "training_lowers_the_loss",
        LORA,
        "A never moves",
        after_init(LoRAGraft, lambda g: g.a.register_hook(lambda grad: 0 * grad)),
    ),
    Mutant("turns_as_declared", TURNS, "turns are not declared", declare(LISA, in_turn=False)),
    Mutant("turns_as_declared", TURNS, "nothing ever rests", put(LISA, "before_step", lambda self, *_: None)),
    Mutant(
        "turns_as_declared",
        TURNS,
        "groups without what rests",
        put(Tuned, "_ever", lambda self: self.trainable()),
    ),
    Mutant("dropout_rests_in_eval", LORA, "dropout stays on in eval", dropped(lambda self: self.dropout)),
    Mutant("dropout_acts_in_training", LORA, "dropout is forgotten", dropped(lambda self: 0.0)),
    Mutant("recomputation_keeps_gradients", LORA, "each call of a forward is another", factors_times(growing)),
    Mutant("training_leaves_the_base_alone", LORA, "the forward writes to W", around(LoRAGraft, "forward", move_base)),
    Mutant(
        "training_leaves_the_base_alone", LORA, "a graft is a child of its site", around(LoRA, "graft", hang_into_base)
    ),
    Mutant("forward_is_the_equation", LORA, "`weight` forgets the scale", put(LowRankGraft, "weight", unscaled)),
    Mutant(
        "forward_is_the_equation",
        DORA,
        "the norm leaves W A^T . B out",
        put(DoRAGraft, "norm", lambda self, w: (self.square + ((self.b * self.scale) @ self.a).square().sum(1)).sqrt()),
    ),
    Mutant(
        "forward_is_the_equation",
        DORA,
        "the norm is part of the gradient",
        put(
            DoRAGraft,
            "norm",
            lambda self, w: (w + self.scale * self.b @ self.a).norm(dim=1),
        ),
    ),
    Mutant("linear_as_declared", LORA, "linearity is claimed", declare(LoRA, linear=True)),
    Mutant("linear_as_declared", MISS, "linearity is not declared", declare(MiSS, linear=False)),
    Mutant("low_rank_as_declared", LORA, "factors are not declared", declare(LoRA, to_lora=False)),
    Mutant(
        "low_rank_as_declared",
        LORA,
        "`weight` is not the product of the factors",
        around(LoRAGraft, "weight", lambda original, self, w: original(self, w) + 0.01 * w.square()),
    ),
    Mutant("merging_is_refused", SERIES, "an activation claims to be a weight", put(SeriesGraft, "maps", ("weight",))),
    Mutant(
        "drawn_values_are_in_the_file",
        MASKED,
        "a drawn buffer is not persistent",
        after_init(MaskedGraft, lambda g: g._non_persistent_buffers_set.add("mask")),
    ),
    Mutant(
        "a_copy_is_independent", LORA, "a copy is the original", put(LoRAGraft, "__deepcopy__", lambda self, memo: self)
    ),
    Mutant("compiles_whole", SERIES, "a break in the graph", around(SeriesGraft, "forward", break_graph)),
    Mutant(
        "peft_loads_ours",
        LORA,
        "alpha is not written for PEFT",
        declare(LoRA, peft=replace(LORA_PEFT, fields={"rank": "r"})),
    ),
    Mutant(
        "peft_loads_ours",
        MISS,
        "another tensor name than PEFT's",
        declare(MiSS, peft=replace(MISS_PEFT, tensors={"d": "miss_d"})),
    ),
    Mutant("pefts_files_load", MINI, "mini_r is not read", put(MiSS, "from_peft", classmethod(lambda cls, config: {}))),
    Mutant(
        "rows_are_each_alone",
        PROMPT,
        "a batch changes its virtual tokens",
        around(Prompt, "embed", lambda original, self, x: original(self, x) * len(x)),
    ),
]
