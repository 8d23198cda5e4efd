"""A search for where an adapter is needed: gates on its grafts, learned before training.

    min_z L_2(theta*(z), g(z))    theta*(z) = argmin_theta L_1(theta, g(z))

Each graft's change is multiplied by a gate g.  What the adapter trains (theta) and the gates' logits z (n,) are trained
by turns on batches of their own, as in DARTS (Liu et al., 2018, arXiv:1806.09055).  The logits belong to the search, so
that no adapter ever holds them, and the base is not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pegbox.core.calibration import Batch, Data
from pegbox.core.errors import MethodError
from pegbox.core.seeding import seeded
from pegbox.core.tuned import Tuned

HELD = 64  # batches that are kept, for data that ends before the search does
NUDGE = 0.01  # length of the step of the finite difference, as in DARTS's code


class Gated(Protocol):
    """A graft whose change is multiplied by `gate` (), where there is one."""

    gate: Tensor | None


def pairs(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Two batches at a time, without end: every one is only ever the first or only ever the second of a pair.

    Where batches end, the first `HELD` come again.

    Raises:
        MethodError: fewer than two batches.
    """
    kept, read = list[tuple[Batch, Batch]](), iter(batches)
    for pair in zip(read, read, strict=False):
        if len(kept) < HELD // 2:
            kept.append(pair)
        yield pair
    if not kept:
        raise MethodError(
            "a search trains factors on some batches and gates on others, so it takes two batches at least, and the "
            "data has fewer: give more of it, or make batches smaller"
        )
    yield from itertools.cycle(kept)


class GateSearch:
    """Gates and weights of one adapter, trained by turns.

    Args:
        grafts: those that have a gate, by path.
        layers: of each of them; `relax="softmax"` is over the grafts of a layer.
        order: 1, or 2: gates are judged a step of the weights ahead.
        weight_rate, gate_rate: learning rates of the weights (AdamW) and of the logits (Adam).

    Attributes:
        logits: z (n,), zeros at the start, in the order of `grafts`.
        weights: what the adapter trains.
    """

    def __init__(
        self,
        tuned: Tuned,
        name: str,
        grafts: Mapping[str, Gated],
        layers: Sequence[str],
        *,
        relax: Literal["sigmoid", "softmax"] = "sigmoid",
        order: int = 1,
        weight_rate: float,
        gate_rate: float,
    ) -> None:
        self.tuned, self.grafts, self.relax, self.order, self.rate = tuned, grafts, relax, order, weight_rate
        self.weights = [p for p in tuned.adapter(name).own().values() if p.requires_grad]
        device = self.weights[0].device
        numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
        self.layer = torch.tensor([numbers[layer] for layer in layers], device=device)  # (n,)
        self.logits = nn.Parameter(torch.zeros(len(grafts), device=device))
        mine = {id(p) for p in self.weights}
        groups = [
            {"params": [p for p in group["params"] if id(p) in mine], "lr": group["lr"]}
            for group in tuned.groups(weight_rate)
        ]
        self.of_weights = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        self.of_gates = torch.optim.Adam([self.logits], gate_rate)

    def gates(self) -> Tensor:
        """g (n,)."""
        if self.relax == "sigmoid":
            return self.logits.sigmoid()
        grown = (self.logits - self.logits.detach().max()).exp()
        sums = grown.new_zeros(len(self.layer)).index_add(0, self.layer, grown)
        return grown / sums[self.layer]

    def run(self, data: Data, steps: int, seed: int = 0) -> dict[str, float]:
        """The gates by path, after so many steps of the weights and of the logits; gates are off again.

        Args:
            seed: of what the model draws meanwhile, dropout say.

        Raises:
            MethodError: fewer than two batches, or gates that are not finite.
        """
        modes = [(module, module.training) for module in self.tuned.modules()]
        try:
            with seeded(seed, "gates"):
                for first, second in itertools.islice(pairs(data), steps):
                    self.weight_step(data, first)
                    self.gate_step(data, first, second)
        finally:
            self._put([None] * len(self.grafts))
            for module, mode in modes:
                module.training = mode
            self.tuned.zero_grad()
        found = self.gates().detach()
        if not found.isfinite().all():
            raise MethodError("a search met losses that are not finite; lower its learning rates")
        return dict(zip(self.grafts, found.tolist(), strict=True))

    def weight_step(self, data: Data, batch: Batch) -> None:
        """One step of the weights in training mode, the gates as they are."""
        self.tuned.train()
        self.logits.grad = None
        for p, gradient in zip(self.weights, self._gradients(data, batch, self.weights), strict=True):
            p.grad = gradient
        self.of_weights.step()

    def gate_step(self, data: Data, first: Batch, second: Batch) -> None:
        """One step of the logits in eval mode.

        Args:
            first: the weights', which order 2 alone looks at.
            second: the gates' own.
        """
        self.tuned.eval()
        for p in self.weights:
            p.grad = None
        if self.order == 2:
            self.logits.grad = self._ahead(data, first, second)
        else:
            (self.logits.grad,) = self._gradients(data, second, [self.logits])
        self.of_gates.step()

    def _ahead(self, data: Data, first: Batch, second: Batch) -> Tensor:
        """d/dz L_2(theta - xi dL_1/dtheta, z), the mixed derivative by a finite difference; xi is the weights' rate."""
        before = [p.detach().clone() for p in self.weights]
        try:
            self._move(before, self._gradients(data, first, self.weights), -self.rate)
            of_gates, *uphill = self._gradients(data, second, [self.logits, *self.weights])
            size = NUDGE / torch.stack([g.norm() for g in uphill]).norm().clamp_min(1e-12).item()
            sides = []
            for step in (size, -size):
                self._move(before, uphill, step)
                sides += self._gradients(data, first, [self.logits])
        finally:
            self._move(before, before, 0.0)
        return of_gates - self.rate * (sides[0] - sides[1]) / (2 * size)

    @torch.no_grad()
    def _move(self, before: Sequence[Tensor], along: Sequence[Tensor], by: float) -> None:
        for p, start, step in zip(self.weights, before, along, strict=True):
            p.copy_(start + by * step if by else start)

    def _gradients(self, data: Data, batch: Batch, of: Sequence[Tensor]) -> list[Tensor]:
        """Of the loss on a batch; zeros where it does not depend on a tensor."""
        gates = self.gates()
        self._put((gates if any(t is self.logits for t in of) else gates.detach()).unbind())
        found = torch.autograd.grad(data.loss(self.tuned, batch), list(of), allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]

    def _put(self, gates: Iterable[Tensor | None]) -> None:
        for graft, gate in zip(self.grafts.values(), gates, strict=True):
            graft.gate = gate


def largest(gates: Mapping[str, float], groups: Sequence[str], share: float) -> tuple[str, ...]:
    """Paths of the largest gates of each group, floor(share * n) of its n; ties go to earlier paths.

    Args:
        gates: by path.
        groups: of each of them.
    """
    best = set[str]()
    for group in dict.fromkeys(groups):
        paths = [path for path, of in zip(gates, groups, strict=True) if of == group]
        count = int(share * len(paths) + 1e-9)  # 0.29 * 100 is 28.999...
        best.update(sorted(paths, key=lambda path: -gates[path])[:count])
    return tuple(path for path in gates if path in best)
