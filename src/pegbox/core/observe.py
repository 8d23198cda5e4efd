"""What goes into and comes out of sites on some batches, for methods that look at data before training."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core.errors import SettingsError
from pegbox.core.tuned import Tuned

See = Callable[[str, Tensor, Tensor], None]  # path, the input (..., in) and the output (..., out) of one call


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
