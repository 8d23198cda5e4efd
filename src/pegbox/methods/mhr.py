"""Multi-Head Adapter Routing for Cross-Task Generalization (Page-Caccia et al., 2023), arXiv:2211.03831; with
`heads=1` Polytropon (Ponti et al., 2022, arXiv:2202.13914).

    y = W x + s B_t A_t x        s = alpha / r, alpha = 1 in the paper

    head q of A_t = sum_k w_tqk A_kq        of B_t, alike        w_tq = sigmoid(z_tq) / sum_k sigmoid(z_tqk)

    A_k: (r, in)   B_k: (out, r), zero at the start   z: (tasks, heads, skills), nearly zero at the start

A few LoRAs, the skills, are mixed before their product, by weights that belong to the task of a row and not to its
tokens.  Each head mixes a slice of the inputs and of the outputs by weights of its own.  Rows say their tasks as
`task_ids` (B,), in the call or by `tuned.given(task_ids=...)`; with one task there is nothing to say, and the adapter
merges.

After many tasks a new one is learned from few examples, from the skills of those (`start_from` of a run), with one row
of z drawn anew: `train` is `all`, `routing` (MHR-z: z alone, a few numbers a layer) or `average` (MHR-mu: the mean of
the skills is tuned as one LoRA, without z).

The authors keep the skills of MHR-mu apart under weights 1 / skills, which learns as their mean does at a rate that
many times lower.  `sample` draws weights while training, from RelaxedBernoulli(z) at temperature 1, as Polytropon and
HF PEFT do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from pegbox.core import Method, PeftLayout, Preset, Site, Traits, by_settings, setting
from pegbox.core.errors import MethodError, SettingsError
from pegbox.core.layout import LINEAR
from pegbox.core.task_mixture import TaskMixtureGraft

Train = Literal["all", "routing", "average"]


MANY = Traits(
    seams=("output", "update", "mixture"),
    card="mhr",
    merge="no",
    peft=PeftLayout(
        "POLY",
        tensors={"a": "poly_lora_A", "b": "poly_lora_B", "z": "poly_router.module_logits"},
        fields={"rank": "r", "tasks": "n_tasks", "skills": "n_skills", "heads": "n_splits"},
        fixed={"poly_type": "poly"},
    ),
)


def _traits(method: MHR) -> Traits:
    known = MANY if method.tasks > 1 else ONE
    return known if method.alpha == 1 and method.mixes else replace(known, peft=None)


ONE = replace(MANY, seams=("weight", "update", "mixture"), merge="exact", to_lora=True)


@dataclass(frozen=True, kw_only=True)
class MHR(Method):
    rank: int = setting(8, "rank of a skill", at_least=1)
    alpha: float = setting(1.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "share of the update's inputs dropped while training", at_least=0, below=1)
    tasks: int = setting(1, "tasks that rows may be of; 1: as many as the data names", at_least=1)
    names: tuple[str, ...] = setting((), "of the tasks, in the order of task_ids; the data's if not given")
    skills: int = setting(4, "LoRAs that are mixed", at_least=1)
    heads: int = setting(4, "slices of inputs and outputs that are mixed apart; 1 is Polytropon", at_least=1)
    train: Train = setting("all", "what learns; average: the mean of the skills, as one LoRA")  # noqa: RUF009
    sample: bool = setting(False, "draw the weights of skills while training")
    routing_rate: float = setting(100.0, "learning rate of z as a multiple of the skills'", above=0)

    traits: ClassVar[Traits] = by_settings(ONE, _traits)
    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR
    reads: ClassVar[tuple[str, ...]] = ("task_ids",)
    presets: ClassVar[dict[str, Preset]] = {
        "poly": Preset("Ponti et al., 2022, arXiv:2202.13914, as in MHR's code", {"heads": 1, "sample": True}),
        "t0": Preset("Page-Caccia et al., 2023, arXiv:2211.03831: T5-XL on T0", {"rank": 1, "skills": 8, "heads": 64}),
    }

    @property
    def mixes(self) -> bool:
        """Whether there is routing."""
        return self.train != "average"

    @property
    def kept(self) -> int:
        """Skills that the adapter holds."""
        return self.skills if self.mixes else 1

    def graft(self, site: Site, shared: nn.Module | None) -> TaskMixtureGraft:
        if len(set(self.names)) not in (0, self.tasks):
            raise SettingsError(f"mhr.names must name {self.tasks} tasks, each once, got {', '.join(self.names)}")
        if not self.mixes and self.tasks > 1:
            raise SettingsError(f"mhr.train=average tunes one LoRA for one task, and mhr.tasks is {self.tasks}")
        shape = (self.heads, self.kept, self.rank)
        graft = TaskMixtureGraft(site, self.tasks if self.mixes else 0, shape, self.alpha / self.rank, self.dropout)
        graft.rate, graft.sample = self.routing_rate, self.sample
        if self.train == "routing":
            graft.a.requires_grad_(False)
            graft.b.requires_grad_(False)
        return graft

    def size(self, site: Site) -> int | None:
        routing = self.tasks * self.heads * self.kept if self.kept > 1 else 0
        learned = 0 if self.train == "routing" else self.kept * self.rank * sum(site.shape)
        return learned + routing

    def tasks_known(self) -> tuple[str, ...]:
        return self.names

    def tasks_needed(self) -> int:
        return self.tasks if self.tasks > 1 else 0

    def with_tasks(self, names: Sequence[str]) -> Self:
        if self.names or len(names) < 2:
            return self
        if self.tasks not in (1, len(names)):
            told = f"{len(names)} tasks, {', '.join(names)}"
            raise SettingsError(f"mhr.tasks is {self.tasks}, and the data names {told}; leave mhr.tasks out")
        return replace(self, tasks=len(names), names=tuple(names))

    def check_given(self, values: Mapping[str, Any]) -> None:
        if "task_ids" not in values:
            return
        ids = torch.as_tensor(values["task_ids"]).reshape(-1)
        if wrong := [k for k in ids.tolist() if not (isinstance(k, int) and 0 <= k < self.tasks)]:
            raise MethodError(
                f"task_ids must be 0..{self.tasks - 1}, as mhr.tasks is {self.tasks}, got {wrong[0]}; say how many "
                "tasks there are, or name them in the data"
            )

    def inherited(self, other: Self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        skills = {name: theirs[name] for name in ("a", "b")}
        if not self.mixes:
            skills = {name: value.mean(1, keepdim=True) for name, value in skills.items()}
        return {**own, **skills}
