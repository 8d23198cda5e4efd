"""Trainers that take a model apart, and grafts that this would leave out.

TRL puts a forward of its own on the model, which runs the backbone and multiplies its output by the head's weight.  A
graft on the head, or around the whole model, would not run there, and would never train.
"""

from __future__ import annotations

from pegbox.core import Tuned
from pegbox.core.errors import MethodError
from pegbox.core.headless import find_head


def check_nothing_is_bypassed(tuned: Tuned) -> None:
    """Raise MethodError where a trainer has replaced `tuned.forward` and an adapter in use has a graft that the new one
    does not run."""
    if "forward" not in tuned.__dict__:
        return
    found = find_head(tuned.model)
    for path, site in tuned.sites.items():
        names = [name for name in tuned.active if name in site.grafts]
        if not names or not (path == "" or (found is not None and site.module is found[0])):
            continue
        method, where = tuned.adapter(names[0]).method.name(), f"the head ({path})" if path else "the whole model"
        raise MethodError(
            f"this trainer reads the head's weight itself, so that {method} around {where} would not run and never "
            f"train; {f'leave it out with exclude={path!r}' if path else 'use pegbox.Trainer'}"
        )
