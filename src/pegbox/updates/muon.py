"""Muon for some matrices and AdamW for the rest, as one optimizer.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, is `torch.optim.Muon`: momentum,
orthogonalised by five Newton-Schulz steps.

    W <- (1 - lr decay) W - 0.2 sqrt(max(out, in)) lr orthogonal(momentum)

The factor, of Liu et al., "Muon is Scalable for LLM Training", 2025 (arXiv 2502.16982), gives an update the size of
AdamW's, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pegbox.updates.closures import evaluated


class MuonAdamW(torch.optim.Optimizer):
    """Steps both; its groups and state are theirs, so schedules, saving and loading know of one optimizer only.

    Args:
        matrices: group of 2-D parameters, for Muon: `params`, `lr`, `weight_decay`.
        rest: groups for AdamW.
        betas: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        rest: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        self._muon = torch.optim.Muon([matrices], momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(list(rest), betas=betas, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both hold this optimizer's groups and state."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As of any optimizer; a parameter without a gradient stays as it is."""
        loss = evaluated(closure)
        self._muon.step()
        self._adamw.step()
        return loss


def split(
    groups: Iterable[dict[str, Any]], matrices: Iterable[nn.Parameter]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Groups of an optimizer as one of these matrices, and the rest; all of them must be in one group of `groups`."""
    wanted = {id(p) for p in matrices}
    chosen: dict[str, Any] = {}
    rest = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in wanted]
        outside = [p for p in group["params"] if id(p) not in wanted]
        if inside:
            chosen = {"params": inside, "lr": group["lr"], "weight_decay": group["weight_decay"]}
        if outside:
            rest.append({"params": outside, "lr": group["lr"], "weight_decay": group["weight_decay"]})
    return chosen, rest
