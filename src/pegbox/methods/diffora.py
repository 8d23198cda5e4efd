"""DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection (Jiang, Wang, Yuan, 2025),
arXiv:2502.08905.

    search    y = W x + g s B A x      g = sigmoid(z), or softmax over a layer's modules    z: one number a module
              min_z L_2(theta*(z), z)      theta*(z) = argmin_theta L_1(theta, z)      theta: every A and B
    after     y = W x + s B A x        A: (r, in)   B: (out, r), B = 0    own ones at the chosen modules, and one
                                       pair for all the others of a type

A search before training finds the modules that get a LoRA.  Every candidate has factors and a gate; factors learn from
one half of the batches (L_1, AdamW), then gates from the other (L_2, Adam), `search_steps` times.  In each layer the
floor(rho N) largest g of N are chosen; the gates are gone, and `chosen` and `gates` hold what was found.  A given
`chosen` needs no search.  Before there is one the method is LoRA at all candidates.

No official code was found, and much is left open.  Here z = 0 at the start; factors take the first step, for with B = 0
gates have no gradient; they learn in training mode, gates in eval mode; what lies outside all blocks is a layer; a type
is a role, a shape and a rank; factors start again after the search, from where it began, and so do modules trained
whole.  `order=2` is that of DARTS (Liu et al., 2018, arXiv:1806.09055), with xi = `factor_rate`.  When batches end, the
first 64 come again, each for what it was used for before.  Shared factors start as LoRA's, whatever `start` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from pegbox.core import Anatomy, Data, Down, Preset, Site, Traits, Tuned, by_settings, setting
from pegbox.core.adapter import State
from pegbox.core.errors import SettingsError, did_you_mean
from pegbox.core.gate_search import GateSearch, largest
from pegbox.core.method import block_of
from pegbox.core.shared_pairs import Pairs, SharedGraft, type_of
from pegbox.methods.lora import APART, LAYOUT, USUAL, LoRA, LoRAGraft


class CandidateGraft(LoRAGraft):
    """Factors of a site's own, and a gate () during the search."""

    gate: Tensor | None = None

    def factors(self) -> tuple[Down, Tensor, float]:
        down, up, scale = super().factors()
        return down, up if self.gate is None else self.gate.to(up.device) * up, scale


OURS = replace(LAYOUT, claims=False)
ALONE = replace(USUAL, card="diffora", peft=OURS)
ALONE_APART = replace(APART, card="diffora", peft=OURS)
SHARING = replace(ALONE, peft=None)


def _traits(method: DiffoRA) -> Traits:
    if method.shares:
        return SHARING
    return ALONE_APART if method.apart else ALONE


@dataclass(frozen=True, kw_only=True)
class DiffoRA(LoRA):
    rho: float = setting(0.5, "share of the candidates that get factors of their own", at_least=0, at_most=1)
    share: Literal["none", "type", "layer"] = setting("type", "which of the others have one pair; none: no update")
    topk: Literal["per_layer", "global"] = setting("per_layer", "the largest gates of each layer, or of all")
    relax: Literal["sigmoid", "softmax"] = setting("sigmoid", "from logits to gates; softmax is over a layer")
    order: int = setting(1, "2: gates foresee the factors' next step", at_least=1, at_most=2)
    search_steps: int = setting(200, "steps of the factors, and of the gates, before training", at_least=1)
    factor_rate: float = setting(1e-3, "learning rate of the factors in the search", above=0)
    gate_rate: float = setting(0.01, "learning rate of the gates' logits", above=0)
    reinit: bool = setting(True, "factors start again after the search; otherwise from what they have learned")
    draw_seed: int = setting(0, "of the search's dropout and of the shared factors' draw after it")
    chosen: tuple[str, ...] | None = setting(None, "paths with factors of their own; found by the search if none")
    gates: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "the gate of each candidate at the end of the search, by path"}
    )

    traits: ClassVar[Traits] = by_settings(ALONE, _traits)
    found: ClassVar[tuple[str, ...]] = (*LoRA.found, "chosen", "gates")
    presets: ClassVar[dict[str, Preset]] = {}

    @property
    def shares(self) -> bool:
        """Whether what is not chosen has shared factors."""
        return self.chosen is not None and self.share != "none"

    def shared(self, model: nn.Module, anatomy: Anatomy) -> Pairs | None:
        candidates = self.sites(model, anatomy)
        if unknown := [path for path in self.chosen or () if path not in candidates]:
            hint = did_you_mean(unknown[0], candidates)
            raise SettingsError(f"diffora.chosen names {unknown[0]!r}, which its targets do not{hint}")
        return Pairs() if self.shares else None

    def graft(self, site: Site, shared: nn.Module | None) -> LoRAGraft | SharedGraft | None:  # type: ignore[override]
        rank, group = self.rank_at(site.path), type_of if self.share == "type" else block_of
        if rank and (self.chosen is None or site.path in self.chosen):
            return CandidateGraft(site, self)
        if not rank or not isinstance(shared, Pairs):
            return None
        pair = shared.at(site, group(site.path, site.context.anatomy), rank)
        return SharedGraft(pair, site, self, self.b_rate)

    def size(self, site: Site) -> int | None:
        return None if self.shares and site.path not in (self.chosen or ()) else super().size(site)

    def calibrates(self) -> bool:
        return self.chosen is None or self.started.looks

    def calibrate(self, tuned: Tuned, data: Data) -> None:
        for name in [name for name in tuned.active if tuned.adapter(name).method is self]:
            if self.chosen is None:
                self._search(tuned, name, data)
            if self.started.looks:
                self.started.look(tuned, name, data)

    def _search(self, tuned: Tuned, name: str, data: Data) -> None:
        """Build the adapter again with what a search has found."""
        at = {path: site.grafts.get(name) for path, site in tuned.sites.items()}
        grafts = {path: graft for path, graft in at.items() if isinstance(graft, CandidateGraft)}
        layers = [block_of(path, tuned.anatomy) for path in grafts]
        groups = layers if self.topk == "per_layer" else [""] * len(layers)
        self._check(len(largest(dict.fromkeys(grafts, 0.5), groups, self.rho)), len(grafts))
        rates = {"weight_rate": self.factor_rate, "gate_rate": self.gate_rate}
        search = GateSearch(tuned, name, grafts, layers, relax=self.relax, order=self.order, **rates)
        copies = tuned.adapter(name).copies
        start = _copied(grafts, copies) if self.reinit else None
        gates = search.run(data, self.search_steps, self.draw_seed)
        own, whole = start or _copied(grafts, copies)
        kept = {path: round(gate, 4) for path, gate in gates.items()}
        chosen = largest(gates, groups, self.rho)
        tuned.remake(name, replace(self, chosen=chosen, gates=kept), seed=self.draw_seed)
        tuned.adapter(name).copies.load_state_dict(whole)
        for path in chosen:
            tuned.sites[path].grafts[name].load_state_dict(own[path])

    def _check(self, count: int, candidates: int) -> None:
        """Before the search, which takes its time."""
        if self.started.looks and not self.reinit:
            raise SettingsError(f"diffora.reinit must be true with start={self.start}, which comes after the search")
        if self.share == "none" and not count:
            raise SettingsError(
                f"diffora.rho={self.rho} chooses none of {candidates} modules, and share=none leaves the others out; "
                "make rho larger, or share"
            )


def _copied(grafts: Mapping[str, nn.Module], copies: nn.Module) -> tuple[dict[str, State], State]:
    """Copies of the tensors of grafts, by path, and of what is trained whole."""
    state, *each = ({k: v.detach().clone() for k, v in m.state_dict().items()} for m in (copies, *grafts.values()))
    return dict(zip(grafts, each, strict=True)), state
