"""The modules among which targets choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pegbox.anatomy.paths import within
from pegbox.core.site import of_kind

if TYPE_CHECKING:
    from pegbox.anatomy.anatomy import Anatomy


@dataclass(frozen=True)
class Scope:
    """A model's modules by path, and the classes that the caller, `who`, can work on."""

    anatomy: Anatomy
    modules: Mapping[str, nn.Module]
    kinds: tuple[type[nn.Module], ...]
    who: str

    @property
    def whole_modules(self) -> bool:
        """Whether the caller works on any module, so that `attn` is the attention itself, not its matrices."""
        return nn.Module in self.kinds

    @cached_property
    def fitting(self) -> dict[str, None]:
        """Paths of the right kind, in model order; a dict for its ordered keys."""
        return {p: None for p, m in self.modules.items() if of_kind(m, self.kinds) and not self.never_called(p)}

    def fit(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if path in self.fitting]

    def beneath(self, roots: Iterable[str]) -> list[str]:
        """Paths of the right kind that are one of `roots` or lie within one."""
        known = set(roots)
        return [path for path in self.fitting if within(path, known)]

    def never_called(self, path: str) -> bool:
        """torch's MultiheadAttention reads the weight of its out_proj; a graft around the module would not run."""
        return path != "" and isinstance(self.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)

    def linears(self) -> list[str]:
        """Every matrix of the right kind outside the heads; embeddings and convolutions are not linears."""
        heads = set(self.anatomy.roles().get("head", ()))
        return [path for path in self.fitting if _is_linear(self.modules[path]) and not within(path, heads)]

    def leaf_names(self, dots: int = 0) -> Counter[str]:
        """How many fitting modules carry each name, of `dots` + 1 components."""
        return Counter(".".join(path.split(".")[-dots - 1 :]) for path in self.fitting if path)

    def noun(self) -> str:
        """What the fitting modules are called in a message."""
        if nn.Linear not in self.kinds:
            return "modules"
        return "matrices" if any(issubclass(kind, (nn.Embedding, _ConvNd)) for kind in self.kinds) else "linears"


def _is_linear(module: nn.Module) -> bool:
    """A leaf that holds a matrix: nn.Linear, transformers' Conv1D, a quantised layer's packed weight."""
    if isinstance(module, (nn.Embedding, _ConvNd)) or list(module.children()):
        return False
    return any(tensor.dim() > 1 for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
