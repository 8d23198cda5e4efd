"""The equation of a weight method: its fast form, and what is declared about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from pegbox.checks.check import check, require
from pegbox.checks.lab import Lab, every, require_close
from pegbox.checks.when import maps_weights
from pegbox.core.graft import LowRankGraft, WeightGraft
from pegbox.core.low_rank import as_matrix
from pegbox.core.site import Site
from pegbox.core.tuned import Tuned


@check(maps_weights, on="all")
def forward_is_the_equation(lab: Lab) -> None:
    """A faster forward gives what the module gives with `weight(W)` in the place of W, and the same gradients."""
    tuned = lab.shaken()
    have, gradients = lab.output(tuned), lab.gradients(tuned)
    with _plain_forwards(tuned):
        require_close(have, lab.output(tuned), "the forward")
        plain = lab.gradients(tuned)
    every(gradients, plain, require_close, "gradients")


@check(maps_weights)
def linear_as_declared(lab: Lab) -> None:
    """traits.linear holds exactly if the change of every weight is additive in the trained parameters."""
    start, one, two, both = lab.tuned(), lab.shaken(seed=1), lab.shaken(seed=2), lab.tuned()
    with torch.no_grad():
        for key, parameter in both.trainable().items():
            parameter.copy_(one.trainable()[key] + two.trainable()[key] - start.trainable()[key])
    largest = 0.0
    for path, _ in _weight_grafts(both):
        first, second, none = _changes(one, path), _changes(two, path), _changes(start, path)
        for mapped, change in _changes(both, path).items():
            added = first[mapped] + second[mapped] - none[mapped]
            largest = max(largest, float((change - added).abs().max()))
    linear = largest < 1e-5
    declared = lab.method.traits.linear
    require(linear == declared, f"traits.linear is {declared}; additive up to {largest:.1e}")


@check(maps_weights)
def low_rank_as_declared(lab: Lab) -> None:
    """traits.to_lora holds exactly if every graft has factors, whose product is the change of the weight."""
    tuned, declared = lab.shaken(), lab.method.traits.to_lora
    for path, graft in _weight_grafts(tuned):
        low_rank = isinstance(graft, LowRankGraft)
        require(
            low_rank == declared, f"traits.to_lora is {declared}, and {type(graft).__name__} has factors: {low_rank}"
        )
        if isinstance(graft, LowRankGraft):
            _check_factors(tuned.sites[path], graft, _changes(tuned, path)["weight"])


def _check_factors(site: Site, graft: LowRankGraft, change: Tensor) -> None:
    down, up, scale = graft.factors()
    matrix = as_matrix(down, site.shape[1], up)
    require(up.shape[1] == matrix.shape[0], f"factors {tuple(up.shape)} and {tuple(matrix.shape)} do not chain")
    require_close(change, (scale * up @ matrix).detach(), f"weight({site.path}) - W")
    rank = int(torch.linalg.matrix_rank(change, rtol=1e-4))
    require(rank <= up.shape[1], f"the change at {site.path} has rank {rank}, its factors {up.shape[1]}")


def _weight_grafts(tuned: Tuned) -> list[tuple[str, WeightGraft]]:
    pairs = [(path, graft) for path, site in tuned.sites.items() for graft in site.chain]
    return [(path, graft) for path, graft in pairs if isinstance(graft, WeightGraft)]


@torch.no_grad()
def _changes(tuned: Tuned, path: str) -> dict[str, Tensor]:
    """weight(W) - W of every parameter that the graft of one site maps."""
    site = tuned.sites[path]
    (graft,) = site.chain
    return {p: graft.mapped(p, site.read(p)) - site.read(p) for p in graft.maps}


@contextlib.contextmanager
def _plain_forwards(tuned: Tuned) -> Iterator[None]:
    """Every weight graft runs by its equation."""
    with contextlib.ExitStack() as stack:
        for cls in {type(graft) for _, graft in _weight_grafts(tuned)}:
            stack.enter_context(mock.patch.object(cls, "forward", WeightGraft.forward))
        yield
