"""MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models (Xu et al., 2024), arXiv:2405.13053.

    y = W x + sum_e w_e s_e B_e A_e x        w = softmax of the `top_k` largest of G x, zero for the others

    A_e: (r_e, in)   B_e: (out, r_e)   s_e: of adapters that are there already   G: (experts, in), this layer's gate

Adapters of several tasks in one model, and gates that learn which of them each token of each layer wants, so that at
inference nobody names a task.  `adapters` lists their folders: LoRA or what else changes a matrix by a product of two
thin ones, of any ranks and targets, one expert each.  Where the tasks of rows or tokens are said while training
(`task_ids`, the places in that list), `gate_loss` times the gates' cross-entropy with them is added to the loss,
padding left out.

The gates alone train, as in the paper; `train=all` tunes the adapters too, as the authors' released code does.  Their
gates start as linear layers do, these too.  All layers' gates together learn from every token, the prompt's as well.
`temperature` divides the chosen logits at inference (the authors raise it for prompts of several tasks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import Method, Site, Traits, Tuned, by_settings, setting
from pegbox.core.errors import MethodError, SettingsError
from pegbox.core.graft import low_rank_pair
from pegbox.core.layout import LINEAR
from pegbox.core.method import Anatomy, Factors
from pegbox.core.mixture import MixtureGraft, known_tasks, router, spread_of


class MeteoRAGraft(MixtureGraft):
    """Experts stand stacked: a (R, in), b (out, R), R the sum of their ranks; b has their scales in it."""

    def __init__(self, site: Site, method: MeteoRA) -> None:
        super().__init__(method.top_k, spread_of(method.ranks, [1.0] * len(method.ranks)))
        drawn = [low_rank_pair(site, rank) for rank in method.ranks]
        self.a = nn.Parameter(torch.cat([a for a, _ in drawn]), requires_grad=method.train == "all")
        self.b = nn.Parameter(torch.cat([b for _, b in drawn], dim=1), requires_grad=method.train == "all")
        self.gate = router(len(method.ranks), site.shape[1])
        self.temperature = method.temperature

    def stacked(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def logits(self, x: Tensor) -> Tensor:
        g = F.linear(x, self.gate.to(x.dtype))
        return g if self.training else g / self.temperature


USUAL = Traits(seams=("output", "mixture"), card="meteora", merge="no", routed=True)


@dataclass(frozen=True, kw_only=True)
class MeteoRA(Method):
    targets: str | tuple[str, ...] = setting((), "what the adapters change, unless said otherwise")
    adapters: tuple[str, ...] = setting((), "folders of adapters, an expert each; their order is that of task_ids")
    names: tuple[str, ...] = setting((), "of the experts; those of the folders if not given")
    ranks: tuple[int, ...] = setting((), "of the experts, as the adapters have them", at_least=1)
    top_k: int = setting(2, "experts that a token is given to", at_least=1)
    train: Literal["gates", "all"] = setting("gates", "gates: the adapters stay as they are")
    gate_loss: float = setting(50.0, "weight of the gates' cross-entropy with the tasks of rows", at_least=0)
    temperature: float = setting(1.0, "of the chosen logits at inference", above=0)

    traits: ClassVar[Traits] = by_settings(USUAL, lambda method: replace(USUAL, routed=method.chooses))
    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR
    reads: ClassVar[tuple[str, ...]] = ("task_ids",)
    small: ClassVar[Mapping[str, Any]] = {"targets": "all-linear", "ranks": (2, 3, 2), "train": "all"}

    @property
    def chooses(self) -> bool:
        """Whether there are more experts than a token is given to."""
        return len(self.ranks) > self.top_k

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        if not self.ranks:
            raise SettingsError(
                "meteora chooses between adapters that are there already: name their folders, "
                "adapters=[out/first,out/second]"
            )
        return super().sites(model, anatomy)

    def graft(self, site: Site, shared: nn.Module | None) -> MeteoRAGraft:
        return MeteoRAGraft(site, self)

    def size(self, site: Site) -> int | None:
        out, in_ = site.shape
        return len(self.ranks) * in_ + (sum(self.ranks) * (out + in_) if self.train == "all" else 0)

    def penalty(self, tuned: Tuned) -> Tensor | None:
        found = known_tasks(list(tuned.context.routes.values())) if self.gate_loss else None
        return None if found is None else self.gate_loss * found

    def tasks_known(self) -> tuple[str, ...]:
        return self.names or tuple(Path(folder).name for folder in self.adapters)

    def check_given(self, values: Mapping[str, Any]) -> None:
        ids = torch.as_tensor(values.get("task_ids", 0)).reshape(-1)
        if wrong := [k for k in ids.tolist() if not (isinstance(k, int) and 0 <= k < len(self.ranks))]:
            raise MethodError(f"task_ids must be whole numbers 0..{len(self.ranks) - 1}, of experts, got {wrong[0]}")

    # -- adapters that are there already -------------------------------------------------------------------------

    def takes(self) -> Sequence[str]:
        return self.adapters

    def made_from(self, adapters: Sequence[Factors]) -> Method:
        if not adapters:
            return self
        names = self.tasks_known()
        if len(set(names)) < len(names) or len(names) != len(adapters):
            told = ", ".join(names)
            raise SettingsError(f"meteora.names must name {len(adapters)} adapters, each once, got {told}")
        ranks = tuple(max(len(a) for a, _ in factors.values()) for factors in adapters)
        paths = tuple(dict.fromkeys(path for factors in adapters for path in factors))
        return replace(self, names=names, ranks=ranks, targets=self.targets or paths)

    @torch.no_grad()
    def begin(self, tuned: Tuned, name: str, adapters: Sequence[Factors]) -> None:
        if not adapters:
            return
        here = {path: site.grafts[name] for path, site in tuned.sites.items() if name in site.grafts}
        grafts = {path: graft for path, graft in here.items() if isinstance(graft, MeteoRAGraft)}
        for graft in grafts.values():
            for p in (graft.a, graft.b):
                p.zero_()  # what an adapter does not change
        start = 0
        for folder, factors, rank in zip(self.adapters, adapters, self.ranks, strict=True):
            if strange := sorted(factors.keys() - grafts.keys()):
                raise SettingsError(f"{folder} changes {strange[0]}, which is not among meteora.targets")
            for path, (a, b) in factors.items():
                grafts[path].a[start : start + len(a)] = a
                grafts[path].b[:, start : start + len(a)] = b
            start += rank

    def inherited(self, other: Self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates of experts that both have; the others' stay as they are drawn."""
        gate = own["gate"].clone()
        for k, name in enumerate(self.names):
            if name in other.names:
                gate[k] = theirs["gate"][other.names.index(name)]
        return {**own, "gate": gate}
