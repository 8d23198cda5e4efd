"""What goes into and comes out of sites on some batches, and their gradients, for methods that look at data."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pegbox.core.compose import Stack
from pegbox.core.errors import SettingsError
from pegbox.core.graft import WeightGraft
from pegbox.core.method import Anatomy, Method, Traits
from pegbox.core.site import Site
from pegbox.core.tuned import Tuned

if TYPE_CHECKING:
    from pegbox.core.calibration import Data

See = Callable[[str, Tensor, Tensor], None]  # path, the input (..., in) and the output (..., out) of one call
IGNORED = -100  # a label that is not to be predicted
PROBE = "(gradients)"  # name of the adapter that notes gradients


@torch.no_grad()
def observe(tuned: Tuned, batches: Iterable[Mapping[str, Any]], see: See, paths: Iterable[str], *, most: int) -> None:
    """Run the model in eval mode, without labels, and show each call of some sites' modules.

    Args:
        paths: of the sites.
        most: batches to look at.

    Raises:
        SettingsError: a site is a part of a matrix, whose outputs its module does not give apart.
    """
    sites = {path: tuned.sites[path] for path in paths}
    if parts := [path for path, site in sites.items() if site.module_path != path]:
        raise SettingsError(
            f"activations of {parts[0]} cannot be seen apart from those of {sites[parts[0]].module_path}"
        )
    hooks = [site.module.register_forward_hook(partial(_show, see, path)) for path, site in sites.items()]
    known = inspect.signature(tuned.model.forward).parameters.keys() - {"labels"}
    was_training = tuned.training
    tuned.eval()
    try:
        for batch in itertools.islice(batches, most):
            tuned(**{key: value for key, value in batch.items() if key in known})
    finally:
        tuned.train(was_training)
        for hook in hooks:
            hook.remove()


def _show(see: See, path: str, module: nn.Module, args: Any, output: Any) -> None:
    see(path, args[0], output)


def tokens(batch: Mapping[str, Any], *, labelled: bool = False) -> Tensor | None:
    """(B, T) bool: positions that are no padding, or only those of tokens that are to be predicted; None if unsaid."""
    mask, labels, places = (batch.get(name) for name in ("attention_mask", "labels", "position_ids"))
    found = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(labels, Tensor) and labels.ndim == 2:
        wanted = labels.ne(IGNORED)
        if labelled:
            return wanted if found is None else wanted & found
        if found is None and isinstance(places, Tensor) and places.shape == labels.shape:
            return _of_examples(places, wanted)
    return found


def _of_examples(places: Tensor, wanted: Tensor) -> Tensor:
    """Of packed rows: padding is a segment, its positions from 0 as every example's, in which nothing is predicted."""
    segments = places.eq(0).long().cumsum(1)
    predicted = torch.zeros_like(segments).scatter_add(1, segments - segments[:, :1], wanted.long())
    return predicted.gather(1, segments - segments[:, :1]).bool()


# -- gradients -----------------------------------------------------------------------------------------------------


def gradients(
    tuned: Tuned, data: Data, paths: Iterable[str], *, most: int, bytes_at_once: int = 2 << 30
) -> Iterator[tuple[str, Tensor]]:
    """For each site the gradient of the loss with respect to the base's matrix, the mean over batches: (out, in).

    The model runs in training mode as it is now, once for as many sites as `bytes_at_once` holds gradients of.  Nothing
    of the base is touched: one more graft, that changes nothing, notes the gradient of what it passes on.

    Args:
        paths: of the sites.
        most: batches to go through.
    """
    left, names, plan, was_training = list(paths), tuned.active, tuned._plan, tuned.training
    while left:
        now = _as_many(left, {path: 4 * math.prod(tuned.sites[path].shape) for path in left}, bytes_at_once)
        left = left[len(now) :]
        tuned.add(PROBE, _Gradients(targets=tuple(now)))
        try:
            tuned.use(Stack(*names, PROBE)).train()
            count = 0
            for batch in data.cycle(most):
                data.loss(tuned, batch).backward()
                count += 1
            totals = {path: _noted(tuned.sites[path]) for path in now}
        finally:
            tuned.zero_grad()
            tuned.remove(PROBE, then=plan)
            tuned.train(was_training)
        for path in now:
            yield path, totals.pop(path) / count


def _as_many(paths: list[str], sizes: Mapping[str, int], most: int) -> list[str]:
    """The first paths, one at least, whose sizes together are not above `most`."""
    sums = list(itertools.accumulate(sizes[path] for path in paths))
    return paths[: max(1, sum(size <= most for size in sums))]


def _noted(site: Site) -> Tensor:
    graft = site.grafts[PROBE]
    assert isinstance(graft, _GradientGraft)
    return graft.total


class _GradientGraft(WeightGraft):
    """Passes a matrix on, and adds up its gradients."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.total = torch.zeros(site.shape, device=site.device)
        self.one = nn.Parameter(torch.zeros(()))  # for the matrix to have a gradient at all

    def weight(self, w: Tensor) -> Tensor:
        passed: Tensor = _PassedOn.apply(w, self.one, self.total)
        return passed


class _PassedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, one: Tensor, total: Tensor) -> Tensor:
        ctx.total = total
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.total += gradients[0]
        return None, None, None


@dataclass(frozen=True, kw_only=True)
class _Gradients(Method):
    """No method: it puts the graft on sites by path."""

    traits: ClassVar[Traits] = Traits(seams=("weight",))

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return list(self.targets)

    def graft(self, site: Site, shared: nn.Module | None) -> _GradientGraft:
        return _GradientGraft(site)
