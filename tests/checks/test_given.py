"""A method that reads the context is checked with what its family gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pegbox import checks
from pegbox.checks import FAMILIES, Case

SHIFT = '''
"""A shift of every output, times a gain that the context gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pegbox.core import Graft, Method, Site, Traits


class ShiftGraft(Graft):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(site.shape[0]))

    def forward(self, base, x):
        return base(x) + base.site.context.read("gain", like=x) * self.shift


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    traits: ClassVar[Traits] = Traits(seams=("output",), merge="no")
    reads: ClassVar[tuple[str, ...]] = ("gain",)

    def graft(self, site: Site, shared: nn.Module | None) -> ShiftGraft:
        return ShiftGraft(site)
'''


def test_every_check_of_a_method_that_reads_the_context(tmp_path: Path) -> None:
    (tmp_path / "shift.py").write_text(SHIFT)
    gain = dataclasses.replace(FAMILIES["mlp"], given=lambda: {"gain": 0.5, "other": 1.0})
    report = checks.run(Case(str(tmp_path / "shift.py"), families=(gain,)))
    assert report.ok, checks.render(report)
    without = checks.run(Case(str(tmp_path / "shift.py"), families=("mlp",)), only=["starts_as_declared"])
    assert not without.ok
