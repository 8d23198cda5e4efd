"""As LoRA's authors' code: A uniform in +-1 / sqrt(in), B = 0 (Hu et al., 2021), arXiv:2106.09685."""

from __future__ import annotations

from dataclasses import dataclass

from pegbox.core.starts import Start


@dataclass(frozen=True, kw_only=True)
class Default(Start):
    pass
