"""All mutants."""

from __future__ import annotations

from . import in_core, in_methods
from .mutant import Mutant

MUTANTS: list[Mutant] = [*in_methods.MUTANTS, *in_core.MUTANTS]
