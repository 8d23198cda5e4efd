"""Matrices that are not a whole module's `weight`, by their path.

    MODULE.PARAM       another parameter: `experts.down_proj`, `self_attn.in_proj_weight`, or the `weight` of a child
                       whose parent reads it without ever calling the child (`self_attn.out_proj.weight`)
    ...[NAME]          some of its rows: `c_attn[q]`, `experts.down_proj[3]`, `experts.gate_up_proj[3][gate]`

A graft is built for each such matrix and knows of it alone.  Where several belong to one module, one graft around that
module assembles them: as block factors when all are low-rank and the module is linear, else as mapped parameters.
Experts' matrices (experts, out, in) count as one of (experts * out, in).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegbox.core import storage
from pegbox.core.errors import TargetError, did_you_mean
from pegbox.core.graft import Graft, LowRankGraft
from pegbox.core.layout import MATRIX, is_conv1d, layout_of
from pegbox.core.low_rank import Down, as_matrix
from pegbox.core.site import Base, ModuleSite, Site

Rows = tuple[range, ...]  # of a matrix, in the order in which a part has them

_NAMES = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True)
class MatrixPath:
    """A matrix path, taken apart.

    Attributes:
        owner: path of the module whose forward uses the matrix.
        parameter: of the owner, dotted where a child keeps it.
        names: of the rows, outermost first; empty for all.
    """

    owner: str
    parameter: str
    names: tuple[str, ...] = ()

    @property
    def whole(self) -> str:
        """The path without names of rows."""
        if self.parameter == "weight":
            return self.owner
        return f"{self.owner}.{self.parameter}" if self.owner else self.parameter


def parse(path: str, modules: Mapping[str, nn.Module]) -> MatrixPath | None:
    """A path that is no module's, taken apart; None for a module's.

    Raises:
        TargetError: it names no parameter of the model.
    """
    if path in modules:
        return None
    stem, names = split_names(path)
    if stem in modules:
        return MatrixPath(stem, "weight", names)
    holder, _, leaf = stem.rpartition(".")
    if not isinstance(getattr(modules.get(holder), leaf, None), Tensor):
        raise TargetError(f"{path!r} is neither a module nor a parameter of this model")
    if not holder or leaf != "weight" or not _is_matrix(modules[holder]):
        return MatrixPath(holder, leaf, names)
    parent, _, child = holder.rpartition(".")
    return MatrixPath(parent, f"{child}.{leaf}", names)


def split_names(path: str) -> tuple[str, tuple[str, ...]]:
    """`gate_up_proj[3][gate]` as `gate_up_proj` and (`3`, `gate`)."""
    stem, bracket, _ = path.partition("[")
    return stem, tuple(_NAMES.findall(path[len(stem) :])) if bracket else ()


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, MATRIX) or is_conv1d(module)


# -- what there is -------------------------------------------------------------------------------------------------


def parameter_paths(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the matrices that no layer of their own keeps: of experts, and of torch's MultiheadAttention."""
    return [f"{path}.{name}" if path else name for path, m in modules.items() for name in _own_matrices(m)]


def _own_matrices(module: nn.Module) -> Iterable[str]:
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [*(n for n in names if isinstance(getattr(module, n), Tensor)), "out_proj.weight"]
    if isinstance(module, (*MATRIX, nn.modules.conv._ConvNd)):
        return []
    return [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1 < p.shape[1]]


def built_in(module: nn.Module, parameter: str, rows: int) -> dict[str, Rows]:
    """Named rows of a matrix that its module's class says, of `rows` rows."""
    if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
        return stacked(("q", "k", "v"), rows)
    # transformers' expert modules say how gate and up lie in one matrix
    concatenated = module.__dict__.get("is_concatenated")
    if parameter == "gate_up_proj" and isinstance(concatenated, bool):
        return stacked(("gate", "up"), rows) if concatenated else interleaved(("gate", "up"), rows, groups=rows // 2)
    return {}


def named_rows(module: nn.Module, leaf: str, cut: Callable[[int], dict[str, Rows]] | None) -> dict[str, Rows]:
    """The named rows of a whole matrix, by name; of each expert's, where it has some.

    Args:
        module, leaf: what keeps it.
        cut: how an anatomy divides so many rows; None where it says nothing.

    Raises:
        TargetError: it cannot be divided so.
    """
    if not isinstance(getattr(module, leaf, None), Tensor):
        return {}
    rows = matrix_shape(module, leaf)[0]
    return cut(rows) if cut else built_in(module, leaf, rows)


def kept_at(path: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that keeps a whole matrix, a module's or a parameter's, and its name there."""
    if path in modules:
        return modules[path], "weight"
    holder, _, leaf = path.rpartition(".")
    return modules[holder], leaf


def matrix_shape(module: nn.Module, leaf: str) -> tuple[int, int]:
    """(out, in) of a matrix, or of each expert's; (out, 1) of a vector."""
    kept = torch.empty(storage.shape(module, leaf), device="meta")
    shape = layout_of(module, leaf).read(kept).shape
    return (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], 1)


def expert_count(module: nn.Module, leaf: str) -> int | None:
    """How many matrices a 3-D parameter holds; None for a matrix."""
    shape = storage.shape(module, leaf)
    return shape[0] if len(shape) == 3 and not _is_matrix(module) else None


def experts_of(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """A whole parameter's path as paths of matrices: one for each expert, or itself."""
    count = expert_count(*kept_at(path, modules))
    return [path] if count is None else [f"{path}[{expert}]" for expert in range(count)]


def chosen_rows(matrix: MatrixPath, module: nn.Module, leaf: str, named: Mapping[str, Rows]) -> Rows | None:
    """The rows that a matrix path names, experts' matrices counting as one; None for all.

    Args:
        module, leaf: what keeps the parameter.
        named: rows by name, of each matrix.

    Raises:
        TargetError: there is no such expert, or no such name.
    """
    count, out = expert_count(module, leaf), matrix_shape(module, leaf)[0]
    names, first = list(matrix.names), 0
    if count is not None:
        if not names or not names[0].isdigit() or int(names[0]) >= count:
            raise TargetError(f"{matrix.whole} holds a matrix for each of {count} experts; name one, as in [0]")
        first = int(names.pop(0)) * out
    if not names:
        return None if count is None else (range(first, first + out),)
    if len(names) > 1 or names[0] not in named:
        raise TargetError(f"{matrix.whole} has no part {']['.join(names)!r}{did_you_mean(names[0], named)}")
    return tuple(range(r.start + first, r.stop + first) for r in named[names[0]])


def stacked(names: Sequence[str], rows: int, sizes: Sequence[int] = ()) -> dict[str, Rows]:
    """Parts one after another, of equal size or in the proportion of `sizes`."""
    return interleaved(names, rows, sizes, groups=1)


def interleaved(names: Sequence[str], rows: int, sizes: Sequence[int] = (), *, groups: int) -> dict[str, Rows]:
    """Parts one after another in each of `groups` groups of rows, one a head say.

    Raises:
        TargetError: the rows cannot be shared out so.
    """
    sizes = tuple(sizes) or (1,) * len(names)
    group, unit = rows // groups, sum(sizes)
    if rows % groups or group % unit:
        raise TargetError(f"{rows} rows cannot be shared among {', '.join(names)} as {list(sizes)} in {groups} groups")
    cuts = [sum(sizes[:i]) * group // unit for i in range(len(sizes) + 1)]
    return {
        name: tuple(range(at + first, at + last) for at in range(0, rows, group))
        for name, first, last in zip(names, cuts[:-1], cuts[1:], strict=True)
    }


# -- one of them ---------------------------------------------------------------------------------------------------


class Part(Site):
    """Some rows of a parameter of a module, as a site of its own: (out, in), and a bias where the module has one."""

    def __init__(self, path: str, owner: ModuleSite, parameter: str, rows: Rows | None) -> None:
        self.path, self.owner, self.module, self.context = path, owner, owner.module, owner.context
        self.parameter, self.rows = parameter, rows
        self.names = {"weight": parameter}
        if owner.has(bias := _bias_of(parameter)):
            self.names["bias"] = bias
        ranges = rows if rows is not None else (range(self.shape[0]),)
        self._index = torch.tensor(list(chain.from_iterable(ranges)))

    @property
    def grafts(self) -> dict[str, Graft]:
        held = {name: self._of(graft) for name, graft in self.owner.grafts.items()}
        return {name: graft for name, graft in held.items() if graft is not None}

    @property
    def chain(self) -> tuple[Graft, ...]:
        return tuple(graft for graft in map(self._of, self.owner.chain) if graft is not None)

    def _of(self, around: Graft) -> Graft | None:
        """The graft of this matrix in one around its module."""
        members = around.members if isinstance(around, (Assembled, Blocks)) else ()
        return next((graft for part, graft in members if part.path == self.path), None)

    @property
    def module_path(self) -> str:
        return self.owner.path

    @property
    def device(self) -> torch.device:
        module, leaf = self.owner.locate(self.parameter)
        return getattr(module, leaf).device

    @property
    def quantised(self) -> str | None:
        return storage.name(*self.owner.locate(self.parameter))

    @property
    def shape(self) -> tuple[int, int]:
        *rows, in_ = self.owner.shape_of(self.parameter)
        return (sum(map(len, self.rows)) if self.rows is not None else torch.Size(rows).numel()), in_

    def has(self, parameter: str) -> bool:
        return parameter in self.names

    def read(self, parameter: str) -> Tensor:
        return self.taken(by_rows(self.owner.read(self.names[parameter]), parameter))

    def taken(self, whole: Tensor) -> Tensor:
        """These rows of a matrix or a bias."""
        if self.rows is None:
            return whole
        if len(self.rows) == 1:
            return whole[self.rows[0].start : self.rows[0].stop]
        return whole.index_select(0, self.index(whole.device))

    def index(self, device: torch.device) -> Tensor:
        """(out,) numbers of the rows."""
        return self._index.to(device)


def by_rows(value: Tensor, parameter: str) -> Tensor:
    """Experts' matrices as one, and their biases as one."""
    wanted = 1 if parameter == "bias" else 2
    return value.flatten(0, value.dim() - wanted) if value.dim() > wanted else value


def _bias_of(parameter: str) -> str:
    """The name of the bias that goes with a weight."""
    if parameter.endswith("in_proj_weight"):
        return parameter.removesuffix("weight") + "bias"
    stem, dot, leaf = parameter.rpartition(".")
    return f"{stem}{dot}bias" if leaf == "weight" else f"{parameter}_bias"


# -- around their module -------------------------------------------------------------------------------------------

Members = tuple[tuple[Part, Graft], ...]


def assemble(owner: ModuleSite, members: Members) -> Graft:
    """One graft around a module, of grafts for parts of its parameters.

    Raises:
        TargetError: a graft that maps no parameter, or two for the same rows.
    """
    for part, graft in members:
        if not graft.maps:
            raise TargetError(
                f"{part.path!r} is a matrix without outputs of its own, and {type(graft).__name__} changes outputs; "
                f"target {owner.path or 'the model'!r} instead"
            )
    _check_apart(members)
    low_rank = all(isinstance(graft, LowRankGraft) for _, graft in members)
    if low_rank and owner.is_linear:
        return Blocks(members)
    return Assembled(members)


def _check_apart(members: Members) -> None:
    taken: dict[str, list[Part]] = {}
    for part, _ in members:
        taken.setdefault(part.parameter, []).append(part)
    for parameter, parts in taken.items():
        rows = torch.cat([part.index(torch.device("cpu")) for part in parts])
        if len(rows.unique()) < len(rows):
            named = ", ".join(part.path for part in parts[:4])
            raise TargetError(f"targets name some rows of {parameter} twice; they name {named}")


class Assembled(Graft):
    """Every parameter of a module with the images of its parts in their places.  Its members belong to an adapter."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self.members = members  # a tuple, so that no parameter is registered twice
        self.maps = tuple(dict.fromkeys(part.names[name] for part, graft in members for name in graft.maps))

    @property
    def of_experts(self) -> bool:
        """Whether its module holds experts, which see tokens and not rows of a batch."""
        return any(len(part.owner.shape_of(part.parameter)) == 3 for part, _ in self.members)

    def mapped(self, parameter: str, w: Tensor) -> Tensor:
        mine = [(part, graft, name) for part, graft in self.members for name in graft.maps]
        mine = [(part, graft, name) for part, graft, name in mine if part.names[name] == parameter]
        rows = by_rows(w, mine[0][2])
        places = torch.cat([part.index(w.device) for part, _, _ in mine])
        images = torch.cat([graft.mapped(name, part.taken(rows)) for part, graft, name in mine])
        return rows.index_copy(0, places, images).view(w.shape)

    def run(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.through(self)(*args, **kwargs)


class Blocks(LowRankGraft):
    """Low-rank grafts of parts of a linear module's matrix as one: factors side by side, each on its own rows."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self.members = members

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the members: what its factors are made of."""
        return chain.from_iterable(graft.parameters(recurse) for _, graft in self.members)

    @property
    def dropout(self) -> float:  # type: ignore[override]
        """That of the members while they train; they are all of one method."""
        graft = self.members[0][1]
        assert isinstance(graft, LowRankGraft)
        return graft.dropout if graft.training else 0.0

    def factors(self) -> tuple[Down, Tensor, float]:
        owner, downs, ups, before = self.members[0][0].owner, [], [], 0
        each = [graft.factors() for _, graft in self.members if isinstance(graft, LowRankGraft)]
        rank, (out, in_) = sum(up.shape[1] for _, up, _ in each), owner.shape
        for down, up, scale in each:
            downs.append(as_matrix(down, in_, up))
            ups.append(F.pad(scale * up, (before, rank - before - up.shape[1])))
            before += up.shape[1]
        places = torch.cat([part.index(ups[0].device) for part, _ in self.members])
        return torch.cat(downs), ups[0].new_zeros(out, rank).index_copy(0, places, torch.cat(ups)), 1.0
