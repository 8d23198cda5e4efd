"""The modules among which targets choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pegbox.anatomy.paths import ancestry, within
from pegbox.core.errors import TargetError
from pegbox.core.layout import of_kind
from pegbox.core.parts import experts_of, kept_at, named_rows, parameter_paths, split_names

if TYPE_CHECKING:
    from pegbox.anatomy.anatomy import Anatomy

APART = ("head", "mlp.router")  # roles that all-linear leaves alone: an answer and a choice of experts are no updates


@dataclass(frozen=True)
class Scope:
    """A model's modules by path, and the classes that the caller, `who`, can work on.

    With `parts` it also works on matrices that are no module's own weight: on what experts and torch's
    MultiheadAttention keep, and on named rows.
    """

    anatomy: Anatomy
    modules: Mapping[str, nn.Module]
    kinds: tuple[type[nn.Module], ...]
    who: str
    parts: bool = False

    @property
    def whole_modules(self) -> bool:
        """Whether the caller works on any module, so that `attn` is the attention itself, not its matrices."""
        return nn.Module in self.kinds

    @cached_property
    def fitting(self) -> dict[str, None]:
        """Paths of the right kind, modules in model order and then parameters; a dict for its ordered keys."""
        own = {p: None for p, m in self.modules.items() if of_kind(m, self.kinds) and not self.never_called(p)}
        return own | {matrix: None for path in self.parameters for matrix in experts_of(path, self.modules)}

    @cached_property
    def parameters(self) -> dict[str, None]:
        """Paths of the parameters that hold matrices of no module's own; those of experts whole."""
        return dict.fromkeys(parameter_paths(self.modules) if self.parts else ())

    @cached_property
    def pieces(self) -> dict[str, None]:
        """Paths of all named rows of what fits."""
        if not self.parts:
            return {}
        names = {stem: self.names(stem) for stem in dict.fromkeys(map(stem_of, self.fitting))}
        return {f"{path}[{name}]": None for path in self.fitting for name in names[stem_of(path)]}

    def names(self, stem: str) -> list[str]:
        """Names of the rows of a whole matrix; none if it cannot be divided as its data file says."""
        cut = self.anatomy.division.cuts.get(stem)
        try:
            return list(named_rows(*kept_at(stem, self.modules), cut.rows if cut else None))
        except TargetError:
            return []

    @cached_property
    def weights(self) -> dict[str, None]:
        """The weights of fitting modules as parameters, for where a module is read and never called."""
        return {f"{path}.weight": None for path in self.fitting if self.parts and path and path in self.modules}

    def left_out(self, role: str) -> list[str]:
        """Experts' parameters with a role that a caller on whole modules would leave out in silence."""
        found = [] if self.parts else self.anatomy.matrices(role)
        return [path for path in found if not any(map(self._is_of_torch, ancestry(path)))]

    def _is_of_torch(self, path: str) -> bool:
        return isinstance(self.modules.get(path), nn.MultiheadAttention)

    def fit(self, paths: Iterable[str]) -> list[str]:
        """Of `paths`, those that fit; a parameter of experts as their matrices."""
        return [fit for path in paths for fit in self._forms(path)]

    def _forms(self, path: str) -> list[str]:
        if path in self.fitting or path in self.pieces or path in self.weights:
            return [path]
        if stem_of(path) in self.parameters:  # of all experts, perhaps with a name of rows
            stem, names = split_names(path)
            paths = ["".join([each, *(f"[{name}]" for name in names)]) for each in experts_of(stem, self.modules)]
            return [each for each in paths if each in self.fitting or each in self.pieces]
        return [f"{path}.weight"] if f"{path}.weight" in self.parameters else []

    def beneath(self, roots: Iterable[str]) -> list[str]:
        """Paths of the right kind that are one of `roots` or lie within one."""
        known = set(roots)
        return [path for path in self.fitting if within(path, known)]

    def never_called(self, path: str) -> bool:
        """torch's MultiheadAttention reads the weight of its out_proj; a graft around the module would not run."""
        return path != "" and isinstance(self.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)

    def linears(self) -> list[str]:
        """Every matrix of the right kind outside heads and routers; embeddings and convolutions are not linears."""
        roles = self.anatomy.roles()
        apart = {path for role in APART for path in roles.get(role, ())}
        own = [path for path in self.fitting if path in self.modules and _is_linear(self.modules[path])]
        return [path for path in own if not within(path, apart)]

    def leaf_names(self, dots: int = 0) -> Counter[str]:
        """How many fitting modules carry each name, of `dots` + 1 components."""
        return Counter(".".join(stem_of(path).split(".")[-dots - 1 :]) for path in self.fitting if path)

    def noun(self) -> str:
        """What the fitting modules are called in a message."""
        if nn.Linear not in self.kinds:
            return "modules"
        return "matrices" if any(issubclass(kind, (nn.Embedding, _ConvNd)) for kind in self.kinds) else "linears"


def stem_of(path: str) -> str:
    """A matrix path without names of rows."""
    return split_names(path)[0]


def _is_linear(module: nn.Module) -> bool:
    """A leaf that holds a matrix: nn.Linear, transformers' Conv1D, a quantised layer's packed weight."""
    if isinstance(module, (nn.Embedding, _ConvNd)) or list(module.children()):
        return False
    return any(tensor.dim() > 1 for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
