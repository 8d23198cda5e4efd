"""Find modules whose parameters are read by others and which are never called: a graft around one never runs.

Some modules compute with a child's weight and never call the child (`F.linear(x, self.proj.weight)`).  During one
forward, what reads the parameters of each site's module is noted, and what calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pegbox.core.context import Context
from pegbox.core.errors import TargetError
from pegbox.core.site import ModuleSite


class _Noted(dict[str, Any]):
    """A module's parameters, noting when one is looked up by its name."""

    def __init__(self, values: Mapping[str, Any], path: str, read: dict[str, str]) -> None:
        super().__init__(values)
        self.path, self.read = path, read

    def __getitem__(self, name: str) -> Any:
        self.read.setdefault(self.path, name)
        return super().__getitem__(name)


@contextlib.contextmanager
def bypasses_refused(sites: Mapping[str, ModuleSite], context: Context) -> Iterator[None]:
    """Around one forward: refuse a site that others read and nobody calls.

    Raises:
        TargetError: such a site, and what to target instead.
    """
    read: dict[str, str] = {}
    before = {path: site.module._parameters for path, site in sites.items() if site.chain}
    for path, parameters in before.items():
        sites[path].module._parameters = _Noted(parameters, path, read)
    called: set[str] = set()
    context.called = called
    try:
        yield
    finally:
        context.called = None
        for path, parameters in before.items():
            after = dict(sites[path].module._parameters)  # a wrapper that shards may have put others there
            parameters.clear()
            parameters.update(after)
            sites[path].module._parameters = parameters
    for path, parameter in read.items():
        if path not in called:
            raise TargetError(_told(sites[path].module, path, parameter))


def _told(module: nn.Module, path: str, parameter: str) -> str:
    name = type(module).__name__
    return (
        f"{path} ({name}) was never called in this forward, yet its {parameter} was read: the module above it computes "
        f"with the parameter itself, and an adapter around {path} would neither run nor train; "
        f"target {path + '.' + parameter!r}, the parameter, with a method that maps weights"
    )
